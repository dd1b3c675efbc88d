import type { WorkloadCall } from './artefacts.js';

/** The checksum after `count` switches of a stream that started with `seed`, by arithmetic alone. */
export declare function predictChecksum(calls: readonly WorkloadCall[], seed: number, count: bigint): number;

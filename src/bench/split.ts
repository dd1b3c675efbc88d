import { phaseBetween } from '../demo/phase.js';
import { MemtablesError } from '../errors.js';
import type { HostStatistics } from '../host/statistics-client.js';
import { median } from './median.js';

/** What one listener showed in one measurement, by the host's clock. */
export interface Measured {
  /** Trapped reads that were answered. */
  readonly reads: number;
  readonly perSecond: number;
  /** The part of them that were table loads of the guest's workload; the others are its integrity checker's. */
  readonly tableLoads: number;
  /** Microseconds of one: until its answer had come, and from there to the next one. */
  readonly turnaround: number;
  readonly host: number;
}

/** One measurement of each listener, on the same host and with the same trapped frames. */
export interface Round {
  readonly bare: Measured;
  readonly binding: Measured;
  /** `handler`: microseconds of one read inside the engine's handler. */
  readonly engine: Measured & { readonly handler: number };
}

export interface Summary {
  /** Trapped reads a second, of a guest with one vCPU. */
  readonly perSecond: { readonly engine: number; readonly bare: number };
  /** Engine to bare. */
  readonly ratio: number;
  /** What the time of one read with the engine consists of. */
  readonly microseconds: {
    readonly host: number;
    readonly library: number;
    readonly ffi: number;
    readonly engine: number;
  };
}

const NS_PER_US = 1000;
const US_PER_SECOND = 1e6;

/**
 * The difference between two looks at the host.
 *
 * @throws MemtablesError `BENCH_FAILED` when nothing was trapped in between
 */
export function measuredBetween(from: HostStatistics, to: HostStatistics): Measured {
  const grown = (name: keyof HostStatistics['pageFaults']) => to.pageFaults[name] - from.pageFaults[name];
  const reads = grown('answered');
  if (reads === 0 || grown('followed') === 0) {
    throw new MemtablesError('BENCH_FAILED', 'no read was trapped while it was measured', {
      remedy: 'Give more --seconds.',
      context: { reads },
    });
  }
  const turnaround = grown('turnaroundNs') / reads / NS_PER_US;
  const host = grown('hostNs') / grown('followed') / NS_PER_US;
  return {
    reads,
    perSecond: US_PER_SECOND / (turnaround + host),
    tableLoads: phaseBetween(from, to).readViolations / reads,
    turnaround,
    host,
  };
}

/** Medians over the rounds. A part that the noise makes negative stays so. */
export function summarize(rounds: readonly Round[]): Summary {
  const over = (value: (round: Round) => number) => median(rounds.map(value));
  const perSecond = {
    engine: over(({ engine }) => engine.perSecond),
    bare: over(({ bare }) => bare.perSecond),
  };
  return {
    perSecond,
    ratio: perSecond.engine / perSecond.bare,
    microseconds: {
      host: over(({ engine }) => engine.host),
      library: over(({ bare }) => bare.turnaround),
      ffi: over(({ engine, bare }) => engine.turnaround - bare.turnaround - engine.handler),
      engine: over(({ engine }) => engine.handler),
    },
  };
}

/**
 * How many times as long as in the calmest round the bare listener's turnaround was in the median one. It does the same
 * in each: much more than 1 says that other programs kept the processor busy.
 */
export function disturbance(rounds: readonly Round[]): number {
  const turnarounds = rounds.map(({ bare }) => bare.turnaround);
  return median(turnarounds) / Math.min(...turnarounds);
}

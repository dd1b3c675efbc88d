// What native/guest/workload.s and the switches it calls compute, by arithmetic alone: no table, no image.

import { nextRandom } from '../random.js';
import type { SwitchForm, SwitchModel, WorkloadCall } from './artefacts.js';

const HALF = 16;
const LOW_HALF = 0xffff;
const CHECKSUM_ROTATION = 5;

/**
 * The checksum of a stream of one form, switch by switch.
 *
 * Each switch takes one number of the generator: its low half chooses the function (the look-alikes come in
 * turn), its high half the argument.
 */
export class WorkloadModel {
  readonly #calls: readonly WorkloadCall[];
  readonly #inTurn: boolean;
  #random: number;
  #count = 0n;
  #checksum = 0;

  /** @param seed what the stream's report says its generator started with */
  constructor(calls: readonly WorkloadCall[], form: SwitchForm, seed: number) {
    this.#calls = calls.filter((call) => call.form === form);
    this.#inTurn = form === 'look-alike';
    this.#random = seed;
  }

  /** The checksum after `count` switches; `count` may not go down. */
  checksumAfter(count: bigint): number {
    for (; this.#count < count; this.#count++) this.#next();
    return this.#checksum;
  }

  #next(): void {
    this.#random = nextRandom(this.#random);
    const turn = this.#inTurn
      ? Number(this.#count % BigInt(this.#calls.length))
      : ((this.#random & LOW_HALF) * this.#calls.length) >>> HALF;
    const call = this.#calls[turn]!;
    const argument = ((this.#random >>> HALF) * call.range) >>> HALF;
    const rotated = (this.#checksum << CHECKSUM_ROTATION) | (this.#checksum >>> (32 - CHECKSUM_ROTATION));
    this.#checksum = (rotated ^ constantOf(call, argument)) >>> 0;
  }
}

/** The checksum after `count` switches of a stream that started with `seed`. */
export function predictChecksum(
  calls: readonly WorkloadCall[],
  form: SwitchForm,
  seed: number,
  count: bigint,
): number {
  return new WorkloadModel(calls, form, seed).checksumAfter(count);
}

function constantOf(call: WorkloadCall, argument: number): number {
  const [first, second] = call.switches;
  if (second === undefined) return caseConstant(first!, bodyOf(first!, argument));
  const chosen = (argument & 1) === 0 ? first! : second;
  return caseConstant(chosen, bodyOf(chosen, argument >>> 1));
}

/** The number of the case body that runs; `bodies` is the default's. */
function bodyOf(model: SwitchModel, argument: number): number {
  let index = ((argument - model.bias) << model.shift) >>> 0;
  if (model.mask !== 0) index &= model.mask;
  if (model.byteEntries > 0) {
    if (index >= model.byteEntries) return model.bodies;
    index = Math.floor(index / model.byteRun) % model.entries;
  } else if (index >= model.entries) {
    return model.bodies;
  }
  return (index * model.stride) % model.bodies;
}

/** `case_constant` of native/guest/switch.inc. */
function caseConstant(model: SwitchModel, body: number): number {
  return (Math.imul(model.id, 0x9e3779b1) + Math.imul(body, 0x85ebca77) + 0xc2b2ae3d) >>> 0;
}

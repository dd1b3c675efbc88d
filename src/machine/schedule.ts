import { nextRandom } from '../random.js';
import type { Machine, Trap } from './machine.js';

export interface ScheduleOptions {
  /** Any integer; its low 32 bits count. */
  readonly seed: number;
  /** What the timer raises, 16 to 255. */
  readonly timerVector: number;
}

/** Runs are 1 to 2 to the power of a number below this long: half of them are shorter than 64 instructions. */
const RUN_LENGTH_BITS = 12;
/** A timer interrupt comes before one run in this many. */
const RUNS_PER_TICK = 16;

/**
 * Steps a machine as a seed says: which vCPU runs next, for how many instructions, and which one gets a timer
 * interrupt before it. The same seed on the same machine gives the same run, as long as whoever else acts on the
 * machine does the same between the same two calls of `advance`.
 */
export class SeededSchedule {
  readonly #machine: Machine;
  readonly #timerVector: number;
  #state: number;

  constructor(machine: Machine, { seed, timerVector }: ScheduleOptions) {
    this.#machine = machine;
    this.#timerVector = timerVector;
    this.#state = spread(seed);
  }

  /**
   * Lets one vCPU run, and returns the traps that are new. vCPUs that are paused, trapped or halted are passed
   * over; when none can run nothing happens, though a timer interrupt may wake one by the next call.
   */
  advance(): readonly Trap[] {
    const count = this.#machine.vcpuCount;
    if (this.#below(RUNS_PER_TICK) === 0) {
      this.#machine.raiseInterrupt(this.#below(count), this.#timerVector);
    }
    const first = this.#below(count);
    const instructions = 1 + this.#below(1 << this.#below(RUN_LENGTH_BITS));
    for (let turn = 0; turn < count; turn++) {
      const { retired, trap } = this.#machine.step((first + turn) % count, instructions);
      if (trap !== undefined) return [trap];
      if (retired > 0) return [];
    }
    return [];
  }

  #below(limit: number): number {
    this.#state = nextRandom(this.#state);
    return this.#state % limit;
  }
}

/** Keeps neighbouring seeds from beginning alike, and 0 from being the generator's dead state. */
function spread(seed: number): number {
  const MULTIPLIER = 0x9e3779b1;
  const FOR_ZERO = 0x6d2b79f5;
  return Math.imul(seed, MULTIPLIER) >>> 0 || FOR_ZERO;
}

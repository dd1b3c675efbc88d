import type { ViolationHandler } from '../vmi/hypervisor.js';

const MS = 0;
const CALLS = 1;

/** How long a handler has taken so far: kept where another thread can look. */
export class HandlerTime {
  static readonly BYTES = 2 * Float64Array.BYTES_PER_ELEMENT;
  readonly #totals: Float64Array;

  constructor(memory: SharedArrayBuffer) {
    this.#totals = new Float64Array(memory);
  }

  /** The handler, timed. */
  around(handler: ViolationHandler): ViolationHandler {
    const totals = this.#totals;
    return (violation) => {
      const from = performance.now();
      const answer = handler(violation);
      totals[MS]! += performance.now() - from;
      totals[CALLS]! += 1;
      return answer;
    };
  }

  get totals(): { readonly ms: number; readonly calls: number } {
    return { ms: this.#totals[MS]!, calls: this.#totals[CALLS]! };
  }
}

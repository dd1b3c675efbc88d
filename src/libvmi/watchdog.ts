import { MemtablesError } from '../errors.js';
import { FUNCTION_NAMES, type FunctionName } from './abi.js';

// The words of a heartbeat. A change of PROGRESS says that the words before it belong together.
const CALL = 0;
const ALLOWANCE_MS = 1;
const PROGRESS = 2;
const WORDS = 3;

const IDLE = 0;

/** How often, within its limit, the watchdog looks. */
const LOOKS_PER_LIMIT = 4;

/** The memory through which a `Watchdog` sees which native call a session in another thread is in. */
export function createHeartbeat(): SharedArrayBuffer {
  return new SharedArrayBuffer(WORDS * Int32Array.BYTES_PER_ELEMENT);
}

/** The session's side: notes every native call, also the ones that a callback makes inside another. */
export class Heartbeat {
  readonly #words: Int32Array;
  readonly #calls: number[] = [IDLE];
  readonly #allowances: number[] = [0];

  constructor(buffer: SharedArrayBuffer = createHeartbeat()) {
    this.#words = new Int32Array(buffer);
  }

  /** Begins a call that is meant to last up to `allowanceMs`. */
  enter(name: FunctionName, allowanceMs: number): void {
    this.#calls.push(FUNCTION_NAMES.indexOf(name) + 1);
    this.#allowances.push(allowanceMs);
    this.beat();
  }

  leave(): void {
    this.#calls.pop();
    this.#allowances.pop();
    this.beat();
  }

  /** Shows that the innermost call is still getting somewhere. */
  beat(): void {
    Atomics.store(this.#words, CALL, this.#calls.at(-1) ?? IDLE);
    Atomics.store(this.#words, ALLOWANCE_MS, this.#allowances.at(-1) ?? 0);
    Atomics.add(this.#words, PROGRESS, 1);
  }
}

/**
 * Watches the thread that owns libvmi from another one. libvmi's calls can block for ever (resume waits for
 * every vCPU in turn), and nothing inside a blocked thread can notice.
 */
export class Watchdog {
  readonly #words: Int32Array;
  readonly #limitMs: number;
  readonly #onStuck: (error: MemtablesError) => void;
  readonly #timer: NodeJS.Timeout;
  #progress = -1;
  #since = 0;
  #reported = false;

  /**
   * Calls `onStuck` with a `HYPERVISOR_STUCK` that names the call, once for each call that makes no progress for
   * `limitMs`; the time that a call is meant to wait (listen's timeout) is allowed on top.
   */
  constructor(
    heartbeat: SharedArrayBuffer,
    options: { readonly limitMs: number },
    onStuck: (error: MemtablesError) => void,
  ) {
    this.#words = new Int32Array(heartbeat);
    this.#limitMs = options.limitMs;
    this.#onStuck = onStuck;
    this.#timer = setInterval(() => this.look(performance.now()), options.limitMs / LOOKS_PER_LIMIT);
    this.#timer.unref();
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  /** What the timer does: one look at the heartbeat at the time `nowMs`. */
  look(nowMs: number): void {
    const progress = Atomics.load(this.#words, PROGRESS);
    const call = Atomics.load(this.#words, CALL);
    const allowanceMs = Atomics.load(this.#words, ALLOWANCE_MS);
    if (progress !== this.#progress || call === IDLE) {
      this.#progress = progress;
      this.#since = nowMs;
      this.#reported = false;
      return;
    }
    const elapsedMs = nowMs - this.#since;
    if (this.#reported || elapsedMs <= this.#limitMs + allowanceMs) return;
    this.#reported = true;
    const name = FUNCTION_NAMES[call - 1];
    const waitedMs = Math.round(elapsedMs);
    this.#onStuck(
      new MemtablesError('HYPERVISOR_STUCK', `${name} has not returned for ${waitedMs} ms`, {
        remedy:
          'A journal that was left behind lists what is still in the guest; restart the guest, or attach again.',
        context: { call: name, waitedMs, limitMs: this.#limitMs, ...(allowanceMs > 0 && { allowanceMs }) },
      }),
    );
  }
}

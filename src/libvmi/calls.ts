import type { FunctionName } from './abi.js';
import type { Argument, Libvmi } from './library.js';
import type { Heartbeat } from './watchdog.js';

/** Every call into the library goes through here, so that a watchdog can see it. */
export class NativeCalls {
  constructor(
    readonly library: Libvmi,
    readonly heartbeat: Heartbeat,
  ) {}

  /** Returns a status or a count. */
  call(name: FunctionName, ...args: readonly Argument[]): number {
    return Number(this.#call(name, 0, args));
  }

  /** Returns a 64-bit value. */
  call64(name: FunctionName, ...args: readonly Argument[]): bigint {
    return BigInt(this.#call(name, 0, args));
  }

  /** A call that is meant to wait for up to `allowanceMs`. */
  waitingCall(allowanceMs: number, name: FunctionName, ...args: readonly Argument[]): number {
    return Number(this.#call(name, allowanceMs, args));
  }

  #call(name: FunctionName, allowanceMs: number, args: readonly Argument[]): number | bigint {
    this.heartbeat.enter(name, allowanceMs);
    try {
      return this.library.functions[name](...args);
    } finally {
      this.heartbeat.leave();
    }
  }
}

import type { Gva } from '../vmi/address.js';
import type { GprName } from '../x86/registers.js';

/** Which entry a handler is about to load: number (`register` - `offset`) / `factor`. */
export interface IndexSource {
  readonly register: GprName;
  readonly offset: bigint;
  readonly factor: bigint;
}

/** How what is left of a handler can be done without it, from one of its instructions on. */
export interface Exit {
  /** Where to go on, in the guest's own code. */
  readonly rip: Gva;
  /** What the destination register has to hold there; it holds it already where this is absent. */
  readonly entry?: number | IndexSource;
}

/** What is known of a stopped thread: of a vCPU every register, of a preempted thread what its trap frame holds. */
export type StoppedThread = Readonly<Partial<Record<GprName, bigint>>> & { readonly rip: Gva };

/** The registers that change when a thread leaves a handler as if that had run to its end. */
export interface Resumption {
  readonly mustWait?: undefined;
  readonly changes: Readonly<Partial<Record<GprName, bigint>>> & { readonly rip: Gva };
}

/** A thread that has to leave by itself, and why. */
export interface MustWait {
  readonly mustWait:
    | 'uses-stack'
    /** A register that would have to be read or set lies in no trap frame. */
    | 'register-not-in-frame'
    /** What is in the registers is not what the handler would have put there. */
    | 'registers-not-of-handler';
}

/** Gets a thread out of a handler. */
export interface Evacuation {
  /**
   * How `thread` goes on in the guest's own code, which must be back in its place; `undefined` where it is not inside.
   */
  evacuate(thread: StoppedThread): Resumption | MustWait | undefined;
}

/** Out of a handler that uses no stack and changes no flag, from wherever a thread stands in it. */
export class StacklessEvacuation implements Evacuation {
  /** @param exits by the address of the instruction that is next */
  constructor(
    private readonly dst: GprName,
    private readonly entries: Uint32Array,
    private readonly exits: ReadonlyMap<Gva, Exit>,
  ) {}

  evacuate(thread: StoppedThread): Resumption | MustWait | undefined {
    const exit = this.exits.get(thread.rip);
    if (exit === undefined) return undefined;
    const { rip, entry } = exit;
    if (entry === undefined) return { changes: { rip } };
    const value = typeof entry === 'number' ? entry : this.#lookUp(entry, thread);
    if (typeof value === 'object') return value;
    if (thread[this.dst] === undefined) return { mustWait: 'register-not-in-frame' };
    return { changes: { rip, [this.dst]: BigInt(value) } };
  }

  #lookUp({ register, offset, factor }: IndexSource, thread: StoppedThread): number | MustWait {
    const value = thread[register];
    if (value === undefined) return { mustWait: 'register-not-in-frame' };
    const multiple = value - offset;
    const index = multiple / factor;
    const isOfTable = multiple % factor === 0n && index >= 0n && index < BigInt(this.entries.length);
    return isOfTable ? this.entries[Number(index)]! : { mustWait: 'registers-not-of-handler' };
  }
}

/** Out of a handler that keeps the guest's registers on the stack. */
export class NoEvacuation implements Evacuation {
  constructor(private readonly handler: { readonly gva: Gva; readonly size: number }) {}

  evacuate({ rip }: StoppedThread): MustWait | undefined {
    const { gva, size } = this.handler;
    return rip >= gva && rip < gva + BigInt(size) ? { mustWait: 'uses-stack' } : undefined;
  }
}

import type { Gva } from '../vmi/address.js';
import type { GprName } from '../x86/registers.js';

/** Which index a handler is used with: number (`register` - `offset`) / `factor`. */
export interface IndexSource {
  readonly register: GprName;
  readonly offset: bigint;
  readonly factor: bigint;
}

/** How a thread leaves a handler that stands at one of its instructions. */
export interface Exit {
  /** Where it goes on, in the guest's own code: in most cases at the site, to begin anew. */
  readonly rip: Gva;
  /** The index, where registers that the replaced code needs may be overwritten and have to be restored. */
  readonly index?: number | IndexSource;
}

/** What is known of a stopped thread: of a vCPU every register, of a preempted thread what its trap frame holds. */
export type StoppedThread = Readonly<Partial<Record<GprName, bigint>>> & { readonly rip: Gva };

/** The general-purpose registers that a trap frame of NT holds, besides RSP. */
export const IN_TRAP_FRAME: ReadonlySet<GprName> = new Set<GprName>([
  ...(['rax', 'rcx', 'rdx', 'rbp'] as const),
  ...(['r8', 'r9', 'r10', 'r11'] as const),
]);

/** The registers that change when a thread leaves a handler. */
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

/** Registers that the replaced code reads and that it, or its handler, overwrites. */
export interface Overwritten {
  /** The one that holds the index. */
  readonly idx: GprName | undefined;
  /** Those that hold the image base. */
  readonly bases: readonly GprName[];
  readonly baseValue: bigint;
}

/**
 * Out of a handler that uses no stack, from wherever a thread stands in it: back to the site, with what the replaced
 * code needs in its registers. What it does not need it overwrites anyway, the flags included.
 */
export class StacklessEvacuation implements Evacuation {
  /** @param exits by the address of the instruction that is next */
  constructor(
    private readonly overwritten: Overwritten,
    private readonly indices: number,
    private readonly exits: ReadonlyMap<Gva, Exit>,
  ) {}

  evacuate(thread: StoppedThread): Resumption | MustWait | undefined {
    const exit = this.exits.get(thread.rip);
    if (exit === undefined) return undefined;
    const { rip, index } = exit;
    if (index === undefined) return { changes: { rip } };
    const { idx, bases, baseValue } = this.overwritten;
    const restored: Partial<Record<GprName, bigint>> = {};
    for (const base of bases) restored[base] = baseValue;
    if (idx !== undefined) {
      const value = typeof index === 'number' ? BigInt(index) : this.#lookUp(index, thread);
      if (typeof value === 'object') return value;
      restored[idx] = value;
    }
    const isInFrame = (Object.keys(restored) as GprName[]).every((name) => thread[name] !== undefined);
    return isInFrame ? { changes: { ...restored, rip } } : { mustWait: 'register-not-in-frame' };
  }

  #lookUp({ register, offset, factor }: IndexSource, thread: StoppedThread): bigint | MustWait {
    const value = thread[register];
    if (value === undefined) return { mustWait: 'register-not-in-frame' };
    const multiple = value - offset;
    const index = multiple / factor;
    const isOfTable = multiple % factor === 0n && index >= 0n && index < BigInt(this.indices);
    return isOfTable ? index : { mustWait: 'registers-not-of-handler' };
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

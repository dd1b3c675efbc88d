import type { Gva } from '../vmi/address.js';
import type { GprName, Registers } from '../x86/registers.js';

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

/** Gets a vCPU out of a handler that uses no stack and changes no flag, wherever it stands in it. */
export class Evacuation {
  /** @param exits by the address of the instruction that is next */
  constructor(
    private readonly dst: GprName,
    private readonly entries: Uint32Array,
    private readonly exits: ReadonlyMap<Gva, Exit>,
  ) {}

  /**
   * The registers with which a vCPU goes on as if the handler had run to its end; `undefined` where it is not inside,
   * or its index is none of the table. The guest's own code must be back in its place.
   */
  registersFor(registers: Registers): Registers | undefined {
    const exit = this.exits.get(registers.rip);
    if (exit === undefined) return undefined;
    const { rip, entry } = exit;
    if (entry === undefined) return { ...registers, rip };
    const value = typeof entry === 'number' ? entry : this.#lookUp(entry, registers);
    return value === undefined ? undefined : { ...registers, rip, [this.dst]: BigInt(value) };
  }

  #lookUp({ register, offset, factor }: IndexSource, registers: Registers): number | undefined {
    const multiple = registers[register] - offset;
    const index = multiple / factor;
    if (multiple % factor !== 0n || index < 0n || index >= BigInt(this.entries.length)) return undefined;
    return this.entries[Number(index)];
  }
}

import type { Machine } from '../../src/machine/machine.js';
import { type Gpa, type Gva, hex } from '../../src/vmi/address.js';
import { GPR_NAMES, type GprName } from '../../src/x86/registers.js';

/** The registers that generated code could change. */
export type CpuState = Record<GprName | 'rip' | 'rflags', bigint>;

export const STATE_NAMES = [...GPR_NAMES, 'rip', 'rflags'] as const;

/**
 * Runs pieces of code on one vCPU, each from a given state of registers and memory. All code and data lie in
 * one arena, so that a change of any byte of it shows.
 */
export class Arena {
  readonly start: Gva;
  readonly #gpa: Gpa;

  /** @param mappedAt the GVA of GPA 0 */
  constructor(
    private readonly machine: Machine,
    gpa: Gpa,
    readonly size: number,
    readonly mappedAt: Gva,
  ) {
    this.#gpa = gpa;
    this.start = mappedAt + gpa;
  }

  write(gva: Gva, bytes: Uint8Array): void {
    this.machine.writePhysical(gva - this.mappedAt, bytes);
  }

  /** Every byte of the arena. */
  memory(): Buffer {
    return Buffer.from(this.machine.readPhysical(this.#gpa, this.size));
  }

  enter(state: CpuState): void {
    this.machine.setRegisters(0, state);
  }

  /** Runs this many instructions, and fails if one of them does not retire. */
  step(instructions: number): void {
    const { retired, trap } = this.machine.step(0, instructions);
    if (retired !== instructions || trap !== undefined) {
      throw new Error(`${retired} of ${instructions} instructions ran; RIP is ${hex(this.state().rip)}`);
    }
  }

  /** Runs until RIP is `end`, and fails if that takes more instructions than `limit`. */
  runTo(end: Gva, limit: number): void {
    for (let count = 0; this.machine.registers(0).rip !== end; count++) {
      if (count === limit) throw new Error(`${hex(end)} was not reached; RIP is ${hex(this.state().rip)}`);
      this.step(1);
    }
  }

  state(): CpuState {
    const registers = this.machine.registers(0);
    return Object.fromEntries(STATE_NAMES.map((name) => [name, registers[name]])) as CpuState;
  }
}

/** What differs between two states, for a message: `rax 0x1 -> 0x2`. */
export function differences(before: CpuState, after: CpuState): string[] {
  return STATE_NAMES.filter((name) => before[name] !== after[name]).map(
    (name) => `${name} ${hex(before[name])} -> ${hex(after[name])}`,
  );
}

import { MemtablesError } from '../errors.js';
import { type Gva, hex } from '../vmi/address.js';
import { decodeInstruction, type Instruction, MAX_INSTRUCTION_LENGTH } from './instruction.js';

/** Enough for every hot site of a kernel; an entry is a few hundred bytes. */
const DEFAULT_CAPACITY = 4096;

/**
 * Decoded instructions by their address, so that a hot reader is decoded once. Whoever changes code in the
 * guest has to `invalidate` the changed bytes.
 */
export class InstructionCache {
  /** In the order of last use. */
  private readonly instructions = new Map<Gva, Instruction>();

  constructor(private readonly capacity = DEFAULT_CAPACITY) {}

  get size(): number {
    return this.instructions.size;
  }

  /**
   * The instruction at `rip`; `read` brings the bytes there (15, or fewer at the end of what is mapped) and
   * is only called when the instruction is not cached.
   * @throws MemtablesError `GUEST_STRUCTURE_INVALID` where the bytes are no instruction
   */
  lookup(rip: Gva, read: () => Uint8Array): Instruction {
    const cached = this.instructions.get(rip);
    if (cached !== undefined) {
      this.instructions.delete(rip);
      this.instructions.set(rip, cached);
      return cached;
    }
    const bytes = read();
    const instruction = decodeInstruction(bytes, rip);
    if (instruction === undefined) {
      throw new MemtablesError('GUEST_STRUCTURE_INVALID', `there is no instruction at ${hex(rip)}`, {
        remedy: 'The code is not what the processor runs, or not readable; check the page tables in use.',
        context: { rip, bytes: Buffer.from(bytes.subarray(0, MAX_INSTRUCTION_LENGTH)).toString('hex') },
      });
    }
    this.instructions.set(rip, instruction);
    if (this.instructions.size > this.capacity) {
      const [oldest] = this.instructions.keys();
      this.instructions.delete(oldest!);
    }
    return instruction;
  }

  /** Drops every instruction that has a byte in `[address, address + length)`; returns how many. */
  invalidate(address: Gva, length: number): number {
    if (length <= 0) return 0;
    let dropped = 0;
    const reach = BigInt(MAX_INSTRUCTION_LENGTH - 1);
    for (let rip = address - reach; rip < address + BigInt(length); rip++) {
      const instruction = this.instructions.get(rip);
      if (instruction === undefined || rip + BigInt(instruction.length) <= address) continue;
      this.instructions.delete(rip);
      dropped++;
    }
    return dropped;
  }
}

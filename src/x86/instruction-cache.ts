import { MemtablesError } from '../errors.js';
import { type Gva, hex } from '../vmi/address.js';
import { decodeInstruction, type Instruction, MAX_INSTRUCTION_LENGTH } from './instruction.js';
import { type MemoryAccess, memoryAccess } from './memory-access.js';

/** Enough for every hot site of a kernel; an entry is a few hundred bytes. */
const DEFAULT_CAPACITY = 4096;

/** An instruction with what is asked of it at every violation. */
export interface CachedInstruction extends Instruction {
  readonly read: MemoryAccess;
  readonly write: MemoryAccess;
}

interface Entry {
  readonly instruction: CachedInstruction;
  /** The lookup that used it last. */
  used: number;
}

/**
 * Decoded instructions by their address, so that a hot reader is decoded once. Whoever changes code in the
 * guest has to `invalidate` the changed bytes.
 */
export class InstructionCache {
  private readonly instructions = new Map<Gva, Entry>();
  private lookups = 0;

  constructor(private readonly capacity = DEFAULT_CAPACITY) {}

  get size(): number {
    return this.instructions.size;
  }

  /**
   * The instruction at `rip`; `read` brings the bytes there (15, or fewer at the end of what is mapped) and
   * is only called when the instruction is not cached.
   * @throws MemtablesError `GUEST_STRUCTURE_INVALID` where the bytes are no instruction
   */
  lookup(rip: Gva, read: (rip: Gva) => Uint8Array): CachedInstruction {
    const used = ++this.lookups;
    const cached = this.instructions.get(rip);
    if (cached !== undefined) {
      // Nothing is put in order here: a hit is what has to be cheap.
      cached.used = used;
      return cached.instruction;
    }
    const bytes = read(rip);
    const decoded = decodeInstruction(bytes, rip);
    if (decoded === undefined) {
      throw new MemtablesError('GUEST_STRUCTURE_INVALID', `there is no instruction at ${hex(rip)}`, {
        remedy: 'The code is not what the processor runs, or not readable; check the page tables in use.',
        context: { rip, bytes: Buffer.from(bytes.subarray(0, MAX_INSTRUCTION_LENGTH)).toString('hex') },
      });
    }
    const instruction = {
      ...decoded,
      read: memoryAccess(decoded, 'read'),
      write: memoryAccess(decoded, 'write'),
    };
    if (this.instructions.size >= this.capacity) this.dropOlderHalf();
    this.instructions.set(rip, { instruction, used });
    return instruction;
  }

  clear(): void {
    this.instructions.clear();
  }

  /** Half of them at once: a guest can have every one that is looked up be a new one. */
  private dropOlderHalf(): void {
    const byUse = [...this.instructions].sort(([, a], [, b]) => a.used - b.used);
    for (const [rip] of byUse.slice(0, Math.ceil(byUse.length / 2))) this.instructions.delete(rip);
  }

  /** Drops every instruction that has a byte in `[address, address + length)`; returns how many. */
  invalidate(address: Gva, length: number): number {
    if (length <= 0) return 0;
    let dropped = 0;
    const reach = BigInt(MAX_INSTRUCTION_LENGTH - 1);
    for (let rip = address - reach; rip < address + BigInt(length); rip++) {
      const entry = this.instructions.get(rip);
      if (entry === undefined || rip + BigInt(entry.instruction.length) <= address) continue;
      this.instructions.delete(rip);
      dropped++;
    }
    return dropped;
  }
}

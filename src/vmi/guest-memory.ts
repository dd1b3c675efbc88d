import { MemtablesError } from '../errors.js';
import { type Gpa, type Gva, hex, PAGE_SIZE, pageOffset } from './address.js';
import type { Hypervisor } from './hypervisor.js';

/** No structure we read is larger; a bigger size came out of hostile guest memory. */
const MAX_READ = 64 * 1024 * 1024;

/** Virtual memory of the guest kernel, seen through one page table (the System process's). */
export class GuestMemory {
  constructor(
    private readonly hypervisor: Pick<Hypervisor, 'readPhysical' | 'translate'>,
    readonly pageTable: Gpa,
  ) {}

  /** @throws MemtablesError `GUEST_MEMORY_UNMAPPED` */
  translate(gva: Gva): Gpa {
    const gpa = this.hypervisor.translate(this.pageTable, gva);
    if (gpa === undefined) {
      throw new MemtablesError('GUEST_MEMORY_UNMAPPED', `no memory is mapped at ${hex(gva)}`, {
        remedy: 'Check that the profile belongs to this kernel.',
        context: { gva, pageTable: this.pageTable },
      });
    }
    return gpa;
  }

  isMapped(gva: Gva): boolean {
    return this.hypervisor.translate(this.pageTable, gva) !== undefined;
  }

  /** @throws MemtablesError `GUEST_MEMORY_UNMAPPED`, or `GUEST_STRUCTURE_INVALID` for an absurd length */
  read(gva: Gva, length: number): Buffer {
    if (!Number.isInteger(length) || length < 0 || length > MAX_READ) {
      throw new MemtablesError(
        'GUEST_STRUCTURE_INVALID',
        `a read of ${length} bytes at ${hex(gva)} was refused`,
        {
          remedy: 'The guest holds a structure with an impossible size; check the profile.',
          context: { gva, length },
        },
      );
    }
    const bytes = Buffer.alloc(length);
    for (let done = 0; done < length; ) {
      const at = gva + BigInt(done);
      const piece = Math.min(PAGE_SIZE - pageOffset(at), length - done);
      bytes.set(this.hypervisor.readPhysical(this.translate(at), piece), done);
      done += piece;
    }
    return bytes;
  }

  /** As `read`; `undefined` where a part of the range is not mapped. */
  readIfMapped(gva: Gva, length: number): Buffer | undefined {
    try {
      return this.read(gva, length);
    } catch (error) {
      if (error instanceof MemtablesError && error.code === 'GUEST_MEMORY_UNMAPPED') return undefined;
      throw error;
    }
  }

  readU8(gva: Gva): number {
    return this.read(gva, 1).readUInt8();
  }

  readU16(gva: Gva): number {
    return this.read(gva, 2).readUInt16LE();
  }

  readU32(gva: Gva): number {
    return this.read(gva, 4).readUInt32LE();
  }

  readU64(gva: Gva): bigint {
    return this.read(gva, 8).readBigUInt64LE();
  }
}

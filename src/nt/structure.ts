import { MemtablesError } from '../errors.js';
import { type Gva, hex } from '../vmi/address.js';
import type { GuestMemory } from '../vmi/guest-memory.js';
import type { Profile } from './profile.js';

/** The upper half of a 48-bit address space: all that a kernel pointer can be. */
const KERNEL_SPACE = 0xffff_8000_0000_0000n;
const ADDRESS_SPACE_END = 1n << 64n;

export function isKernelAddress(gva: Gva): boolean {
  return gva >= KERNEL_SPACE && gva < ADDRESS_SPACE_END;
}

/** What is said of every structure that does not add up. */
export function structureInvalid(
  message: string,
  context: Readonly<Record<string, unknown>>,
): MemtablesError {
  return new MemtablesError('GUEST_STRUCTURE_INVALID', message, {
    remedy: 'Try again: a vCPU may have been changing it. If it stays, the guest or its profile is wrong.',
    context,
  });
}

/** @throws MemtablesError `GUEST_STRUCTURE_INVALID` unless `gva` is in kernel space */
export function kernelPointer(gva: Gva, what: string): Gva {
  if (!isKernelAddress(gva)) throw structureInvalid(`${what} is ${hex(gva)}, not a kernel address`, { gva });
  return gva;
}

/** The chosen fields of one structure type: where they are, and how to read them all at once. */
export class Layout<Field extends string> {
  private readonly offsets = new Map<Field, number>();
  private readonly start: number;
  private readonly end: number;

  /**
   * `sizes` gives each field's size in bytes.
   *
   * @throws MemtablesError `SYMBOL_NOT_FOUND` when the profile lacks the type or a field
   */
  constructor(profile: Profile, type: string, sizes: Readonly<Record<Field, number>>) {
    let start = Number.POSITIVE_INFINITY;
    let end = 0;
    for (const field of Object.keys(sizes) as Field[]) {
      const offset = profile.offset(type, field);
      this.offsets.set(field, offset);
      start = Math.min(start, offset);
      end = Math.max(end, offset + sizes[field]);
    }
    this.start = start;
    this.end = end;
  }

  /** Reads the fields of the structure at `gva`. @throws MemtablesError `GUEST_MEMORY_UNMAPPED` */
  read(memory: GuestMemory, gva: Gva): Fields<Field> {
    const bytes = memory.read(gva + BigInt(this.start), this.end - this.start);
    return new Fields(bytes, (field) => this.offset(field) - this.start);
  }

  /** The field's offset in the structure. */
  offset(field: Field): number {
    return this.offsets.get(field)!;
  }
}

/** The fields of one structure as they were when it was read. */
export class Fields<Field extends string> {
  constructor(
    private readonly bytes: Buffer,
    private readonly at: (field: Field) => number,
  ) {}

  u8(field: Field): number {
    return this.bytes.readUInt8(this.at(field));
  }

  u64(field: Field): bigint {
    return this.bytes.readBigUInt64LE(this.at(field));
  }

  bytesOf(field: Field, length: number): Buffer {
    const at = this.at(field);
    return this.bytes.subarray(at, at + length);
  }
}

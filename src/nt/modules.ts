import { type Gva, pageOffset } from '../vmi/address.js';
import type { GuestMemory } from '../vmi/guest-memory.js';
import type { Kernel } from './kernel.js';
import { walkList } from './list.js';
import type { Profile } from './profile.js';
import { isKernelAddress, kernelPointer, Layout } from './structure.js';

const LIST_HEAD = 'PsLoadedModuleList';
/** The fields used are those of the loader's own type, which every profile has. */
const ENTRY_TYPES = ['_KLDR_DATA_TABLE_ENTRY', '_LDR_DATA_TABLE_ENTRY'] as const;
/** A Windows guest has a few hundred. */
const MAX_MODULES = 0x1000;
/** No PE image is larger. */
const MAX_MODULE_BYTES = 1 << 30;
/** UNICODE_STRING: Length in bytes, MaximumLength, and, aligned, Buffer. */
const UNICODE_STRING_SIZE = 16;
const UNICODE_BUFFER = 8;
/** A file name has up to 255 characters. */
const MAX_NAME_BYTES = 510;

/** An image that NT has loaded for the kernel: a driver, a library of drivers, or NT itself. */
export interface Module {
  /** Its file name; empty where that is not in memory. */
  readonly name: string;
  readonly base: Gva;
  /** In bytes. */
  readonly size: number;
}

/**
 * The loaded kernel modules in the order in which they were loaded, NT's own image first. One whose base or size is
 * impossible is left out. There are none for a profile that does not know the list.
 *
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID`, `GUEST_MEMORY_UNMAPPED` when the list does not add up, as in the
 *   middle of a change; `SYMBOL_NOT_FOUND`, `PROFILE_INVALID`
 */
export function* loadedModules(kernel: Kernel): Generator<Module> {
  const { memory, profile } = kernel;
  if (!profile.hasSymbol(LIST_HEAD)) return;
  const layout = new Layout(profile, entryType(profile), {
    InLoadOrderLinks: 16,
    DllBase: 8,
    SizeOfImage: 4,
    BaseDllName: UNICODE_STRING_SIZE,
  });
  const links = BigInt(layout.offset('InLoadOrderLinks'));
  for (const entry of walkList(memory, kernel.symbol(LIST_HEAD), MAX_MODULES, 'loaded modules')) {
    const fields = layout.read(
      memory,
      kernelPointer(entry - links, 'an entry of the list of loaded modules'),
    );
    const base = fields.u64('DllBase');
    const size = fields.bytesOf('SizeOfImage', 4).readUInt32LE();
    if (!isPlace(base, size)) continue;
    yield { name: readName(memory, fields.bytesOf('BaseDllName', UNICODE_STRING_SIZE)), base, size };
  }
}

function entryType(profile: Profile): string {
  return ENTRY_TYPES.find((type) => profile.hasField(type, 'DllBase')) ?? ENTRY_TYPES[0];
}

function isPlace(base: Gva, size: number): boolean {
  const isSize = size > 0 && size <= MAX_MODULE_BYTES;
  return (
    isSize && pageOffset(base) === 0 && isKernelAddress(base) && isKernelAddress(base + BigInt(size - 1))
  );
}

function readName(memory: GuestMemory, string: Buffer): string {
  const length = string.readUInt16LE();
  const buffer = string.readBigUInt64LE(UNICODE_BUFFER);
  if (length > MAX_NAME_BYTES || !isKernelAddress(buffer)) return '';
  const name = memory.readIfMapped(buffer, length);
  return name?.toString('utf16le').replace(/[^\x20-\x7e]/g, '?') ?? '';
}

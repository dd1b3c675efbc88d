import { MemtablesError } from '../errors.js';
import { PAGE_SIZE } from '../vmi/address.js';

export interface ImageSection {
  readonly rva: number;
  readonly size: number;
  readonly write: boolean;
  readonly execute: boolean;
}

/** The guest's PE64 image as a loader lays it out: `bytes` is `SizeOfImage` long, and not yet relocated. */
export interface LaidOutImage {
  readonly bytes: Buffer;
  readonly preferredBase: bigint;
  readonly entryPoint: number;
  readonly sections: readonly ImageSection[];
  /** RVAs of the addresses to relocate. */
  readonly relocations: readonly number[];
}

const PE64_MAGIC = 0x20b;
const SECTION_HEADER_BYTES = 40;
const SECTION_EXECUTE = 0x20000000;
const SECTION_WRITE = 0x80000000;
const RELOCATION_ABSOLUTE = 0;
const RELOCATION_DIR64 = 10;
const MAX_IMAGE = 64 * 1024 * 1024;

/**
 * Lays out the image that the guest's build wrote; reads no more of PE than that needs.
 *
 * @throws MemtablesError `IMAGE_INVALID`
 */
export function layOutImage(file: Buffer): LaidOutImage {
  try {
    return layOut(file);
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    throw invalid('it is truncated', cause);
  }
}

function layOut(file: Buffer): LaidOutImage {
  const pe = file.readUInt32LE(0x3c);
  const optional = pe + 24;
  if (file.readUInt16LE(optional) !== PE64_MAGIC) throw invalid('it is not a PE64 image');
  const size = file.readUInt32LE(optional + 56);
  const headers = file.readUInt32LE(optional + 60);
  if (size > MAX_IMAGE || size % PAGE_SIZE !== 0 || headers > size) throw invalid('its size is impossible');

  const bytes = Buffer.alloc(size);
  file.copy(bytes, 0, 0, headers);
  const firstSection = optional + file.readUInt16LE(pe + 20);
  const sections = Array.from({ length: file.readUInt16LE(pe + 6) }, (_, index): ImageSection => {
    const header = firstSection + index * SECTION_HEADER_BYTES;
    const virtualSize = file.readUInt32LE(header + 8);
    const rva = file.readUInt32LE(header + 12);
    const raw = file.readUInt32LE(header + 20);
    const characteristics = file.readUInt32LE(header + 36);
    if (rva % PAGE_SIZE !== 0 || rva + virtualSize > size) throw invalid('a section lies outside of it');
    file.copy(bytes, rva, raw, raw + Math.min(virtualSize, file.readUInt32LE(header + 16)));
    return {
      rva,
      size: virtualSize,
      write: (characteristics & SECTION_WRITE) !== 0,
      execute: (characteristics & SECTION_EXECUTE) !== 0,
    };
  });

  return {
    bytes,
    preferredBase: file.readBigUInt64LE(optional + 24),
    entryPoint: file.readUInt32LE(optional + 16),
    sections,
    relocations: readRelocations(bytes, file.readUInt32LE(optional + 152), file.readUInt32LE(optional + 156)),
  };
}

function readRelocations(image: Buffer, start: number, size: number): number[] {
  const relocations: number[] = [];
  for (let block = start; block < start + size; ) {
    const page = image.readUInt32LE(block);
    const bytes = image.readUInt32LE(block + 4);
    if (bytes < 8) throw invalid('a relocation block is too short');
    for (let at = block + 8; at < block + bytes; at += 2) {
      const entry = image.readUInt16LE(at);
      const type = entry >> 12;
      if (type === RELOCATION_ABSOLUTE) continue;
      if (type !== RELOCATION_DIR64) throw invalid(`it has a relocation of type ${type}`);
      relocations.push(page + (entry & (PAGE_SIZE - 1)));
    }
    block += bytes;
  }
  return relocations;
}

function invalid(why: string, cause?: unknown): MemtablesError {
  return new MemtablesError('IMAGE_INVALID', `the guest's image cannot be loaded: ${why}`, {
    remedy: 'Build the guest again with `npm run setup`.',
    cause,
  });
}

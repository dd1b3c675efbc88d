import { MemtablesError } from '../errors.js';
import { hex, PAGE_SIZE } from '../vmi/address.js';

/** A section of an image. Sizes are bytes, addresses relative to the image base. */
export interface Section {
  readonly index: number;
  readonly name: string;
  readonly rva: number;
  /** As the loader maps it: the raw size where the header says 0. Not rounded up to pages. */
  readonly virtualSize: number;
  readonly characteristics: number;
  readonly executable: boolean;
  readonly writable: boolean;
  readonly discardable: boolean;
  /** The linker's promise that the section stays in memory (IMAGE_SCN_MEM_NOT_PAGED). */
  readonly notPaged: boolean;
}

export interface DataDirectory {
  readonly rva: number;
  readonly size: number;
}

/** Which program database belongs to an image. */
export interface PdbReference {
  readonly name: string;
  /** 32 upper-case hexadecimal digits, as profiles write it. */
  readonly guid: string;
  readonly age: number;
}

/** All that the recogniser of switches needs of an image: on disk and in a guest alike. */
export interface ImageBytes {
  readonly sizeOfImage: number;
  readonly sections: readonly Section[];
  /** @throws MemtablesError `IMAGE_INVALID` for a range that is not inside the image */
  read(rva: number, length: number): Uint8Array;
  sectionAt(rva: number): Section | undefined;
}

export const DIRECTORY = { export: 0, import: 1, exception: 3, debug: 6 } as const;

const DOS_HEADER_SIZE = 64;
const DOS_MAGIC = 0x5a4d;
const NT_OFFSET_FIELD = 0x3c;
const NT_SIGNATURE = 0x4550;
const SIGNATURE_AND_FILE_HEADER_SIZE = 24;
const OPTIONAL_MAGIC_PE32_PLUS = 0x20b;
const OPTIONAL_FIXED_SIZE = 112;
const MAX_DIRECTORIES = 16;
const SECTION_HEADER_SIZE = 40;
const MACHINE_NAMES = new Map([
  [0x014c, '32-bit x86'],
  [0x01c4, '32-bit ARM'],
  [0xaa64, 'ARM64'],
]);
const MACHINE_AMD64 = 0x8664;

/** The loader's own limit. */
const MAX_SECTIONS = 96;
/** The loader keeps headers in the first pages; nothing puts them further back. */
const MAX_HEADER_END = 16 * PAGE_SIZE;
const MAX_IMAGE_SIZE = 1 << 30;
/** No structure that we read in one piece is larger. */
const MAX_READ = 64 << 20;
/** The loader rounds a section's file position down to this. */
const FILE_SECTOR = 0x200;

const SECTION_DISCARDABLE = 0x02000000;
const SECTION_NOT_PAGED = 0x08000000;
const SECTION_EXECUTE = 0x20000000;
const SECTION_WRITE = 0x80000000;

/** Of functions and files; the longest real ones have a few hundred bytes. */
const MAX_NAME_LENGTH = 512;

const DEBUG_ENTRY_SIZE = 28;
const MAX_DEBUG_ENTRIES = 64;
const DEBUG_TYPE_CODEVIEW = 2;
const RSDS_SIGNATURE = 0x53445352;
const RSDS_FIXED_SIZE = 24;
const MAX_RSDS_SIZE = 4096;

export function imageInvalid(message: string, context: Record<string, unknown> = {}): MemtablesError {
  return new MemtablesError('IMAGE_INVALID', message, {
    remedy: 'Check that this is a complete 64-bit PE image that is not damaged.',
    context,
  });
}

/** Where the bytes of an image come from; asked only for ranges inside `[0, sizeOfImage)`. */
type Reader = (rva: number, length: number) => Uint8Array;

/**
 * A PE image for x86-64, in a file or mapped in a guest. Nothing in it is trusted: a size, count or
 * offset that does not fit is an `IMAGE_INVALID`, and an image for another processor a `GUEST_UNSUPPORTED`.
 */
export class PeImage implements ImageBytes {
  readonly imageBase: bigint;
  readonly entryPoint: number;
  readonly sizeOfImage: number;
  readonly sizeOfHeaders: number;
  readonly timeDateStamp: number;
  readonly checksum: number;
  /** In ascending order of their addresses, which never overlap. */
  readonly sections: readonly Section[];
  private readonly directories: readonly DataDirectory[];

  private constructor(
    headers: Headers,
    private readonly reader: Reader,
  ) {
    this.imageBase = headers.imageBase;
    this.entryPoint = headers.entryPoint;
    this.sizeOfImage = headers.sizeOfImage;
    this.sizeOfHeaders = headers.sizeOfHeaders;
    this.timeDateStamp = headers.timeDateStamp;
    this.checksum = headers.checksum;
    this.sections = headers.sections;
    this.directories = headers.directories;
  }

  /**
   * An image as it lies on disk.
   * @throws MemtablesError `IMAGE_INVALID`, `GUEST_UNSUPPORTED`
   */
  static fromFile(bytes: Uint8Array): PeImage {
    const headers = parseHeaders((offset, length) => slice(bytes, offset, length, 'a header'));
    for (const { name, rawOffset, rawSize } of headers.sections) {
      if (rawSize > 0 && rawOffset + rawSize > bytes.length) {
        throw imageInvalid(`section ${name} reaches beyond the end of the file`, {
          section: name,
          end: rawOffset + rawSize,
          fileSize: bytes.length,
        });
      }
    }
    if (headers.sizeOfHeaders > bytes.length) {
      throw imageInvalid('the headers reach beyond the end of the file', {
        sizeOfHeaders: headers.sizeOfHeaders,
        fileSize: bytes.length,
      });
    }
    return new PeImage(headers, (rva, length) => readFileLayout(bytes, headers, rva, length));
  }

  /**
   * An image as the loader mapped it. Every page is read at most once, so that analyses keep seeing the
   * bytes of the first look; errors of `read` (a page that is not there) pass through.
   * @throws MemtablesError `IMAGE_INVALID`, `GUEST_UNSUPPORTED`
   */
  static fromMemory(read: Reader): PeImage {
    const pages = new Map<number, Uint8Array>();
    const page = (rva: number): Uint8Array => {
      let bytes = pages.get(rva);
      if (bytes === undefined) {
        bytes = Uint8Array.from(read(rva, PAGE_SIZE));
        if (bytes.length !== PAGE_SIZE) throw imageInvalid(`a short read at ${hex(rva)}`, { rva });
        pages.set(rva, bytes);
      }
      return bytes;
    };
    const reader: Reader = (rva, length) => {
      const result = new Uint8Array(length);
      for (let done = 0; done < length; ) {
        const offset = (rva + done) % PAGE_SIZE;
        const piece = Math.min(PAGE_SIZE - offset, length - done);
        result.set(page(rva + done - offset).subarray(offset, offset + piece), done);
        done += piece;
      }
      return result;
    };
    return new PeImage(parseHeaders(reader), reader);
  }

  /** A directory that is there and lies inside the image, otherwise `undefined`. */
  directory(index: number): DataDirectory | undefined {
    const directory = this.directories[index];
    if (directory === undefined || directory.rva === 0 || directory.size === 0) return undefined;
    if (directory.rva + directory.size > this.sizeOfImage) {
      throw imageInvalid(`data directory ${index} is not inside the image`, { ...directory });
    }
    return directory;
  }

  read(rva: number, length: number): Uint8Array {
    if (
      !Number.isSafeInteger(rva) ||
      !Number.isSafeInteger(length) ||
      rva < 0 ||
      length < 0 ||
      length > MAX_READ ||
      rva + length > this.sizeOfImage
    ) {
      throw imageInvalid(`${length} bytes at ${rva} are not inside the image`, {
        rva,
        length,
        sizeOfImage: this.sizeOfImage,
      });
    }
    return this.reader(rva, length);
  }

  /** @throws MemtablesError `IMAGE_INVALID` */
  readU32(rva: number): number {
    return viewOf(this.read(rva, 4)).getUint32(0, true);
  }

  /** The name at `rva`, which ends with a zero; `what` it is the name of. @throws MemtablesError `IMAGE_INVALID` */
  readName(rva: number, what: string): string {
    const length = Math.min(MAX_NAME_LENGTH, this.sizeOfImage - rva);
    if (length <= 0) throw imageInvalid(`the name of ${what} lies outside the image`, { rva });
    const bytes = Buffer.from(this.read(rva, length));
    const end = bytes.indexOf(0);
    if (end === -1) throw imageInvalid(`the name of ${what} does not end`, { rva });
    return bytes.toString('latin1', 0, end);
  }

  sectionAt(rva: number): Section | undefined {
    return this.sections.find((section) => rva >= section.rva && rva < section.rva + section.virtualSize);
  }

  /** The CodeView record that names the program database, or `undefined` where there is none. */
  pdb(): PdbReference | undefined {
    const directory = this.directory(DIRECTORY.debug);
    if (directory === undefined) return undefined;
    const count = Math.min(Math.floor(directory.size / DEBUG_ENTRY_SIZE), MAX_DEBUG_ENTRIES);
    const entries = viewOf(this.read(directory.rva, count * DEBUG_ENTRY_SIZE));
    for (let at = 0; at < entries.byteLength; at += DEBUG_ENTRY_SIZE) {
      const [type, size, rva] = [12, 16, 20].map((field) => entries.getUint32(at + field, true));
      if (type !== DEBUG_TYPE_CODEVIEW || rva === 0) continue;
      const pdb = this.codeView(rva!, Math.min(size!, MAX_RSDS_SIZE));
      if (pdb !== undefined) return pdb;
    }
    return undefined;
  }

  private codeView(rva: number, size: number): PdbReference | undefined {
    if (size < RSDS_FIXED_SIZE) return undefined;
    const record = Buffer.from(this.read(rva, size));
    if (record.readUInt32LE(0) !== RSDS_SIGNATURE) return undefined;
    const nameEnd = record.indexOf(0, RSDS_FIXED_SIZE);
    return {
      name: record.toString('utf8', RSDS_FIXED_SIZE, nameEnd === -1 ? size : nameEnd),
      guid: guidDigits(record.subarray(4, 20)),
      age: record.readUInt32LE(20),
    };
  }
}

interface RawSection extends Section {
  readonly rawOffset: number;
  readonly rawSize: number;
}

interface Headers {
  readonly imageBase: bigint;
  readonly entryPoint: number;
  readonly sizeOfImage: number;
  readonly sizeOfHeaders: number;
  readonly timeDateStamp: number;
  readonly checksum: number;
  readonly directories: readonly DataDirectory[];
  readonly sections: readonly RawSection[];
}

/** Headers lie at the same offsets in a file and in memory. */
function parseHeaders(read: Reader): Headers {
  const dos = viewOf(read(0, DOS_HEADER_SIZE));
  if (dos.getUint16(0, true) !== DOS_MAGIC) throw imageInvalid('there is no MZ header');
  const nt = dos.getUint32(NT_OFFSET_FIELD, true);
  if (nt < DOS_HEADER_SIZE || nt > MAX_HEADER_END - SIGNATURE_AND_FILE_HEADER_SIZE) {
    throw imageInvalid(`the PE header is said to lie at ${hex(nt)}`, { offset: nt });
  }
  const file = viewOf(read(nt, SIGNATURE_AND_FILE_HEADER_SIZE));
  if (file.getUint32(0, true) !== NT_SIGNATURE) throw imageInvalid('there is no PE signature');
  checkMachine(file.getUint16(4, true));
  const sectionCount = file.getUint16(6, true);
  const timeDateStamp = file.getUint32(8, true);
  const optionalSize = file.getUint16(20, true);
  const optionalStart = nt + SIGNATURE_AND_FILE_HEADER_SIZE;
  const sectionsStart = optionalStart + optionalSize;
  const headersEnd = sectionsStart + sectionCount * SECTION_HEADER_SIZE;
  if (optionalSize < OPTIONAL_FIXED_SIZE || sectionCount > MAX_SECTIONS || headersEnd > MAX_HEADER_END) {
    throw imageInvalid('the PE header has an impossible size', { optionalSize, sectionCount });
  }

  const optional = viewOf(read(optionalStart, optionalSize));
  const magic = optional.getUint16(0, true);
  if (magic !== OPTIONAL_MAGIC_PE32_PLUS) {
    throw imageInvalid(`the optional header is not of the 64-bit kind (${hex(magic)})`, { magic });
  }
  const sizeOfImage = optional.getUint32(56, true);
  const sizeOfHeaders = optional.getUint32(60, true);
  if (sizeOfImage > MAX_IMAGE_SIZE || sizeOfHeaders > sizeOfImage || sizeOfHeaders < headersEnd) {
    throw imageInvalid('the sizes of image and headers do not fit', { sizeOfImage, sizeOfHeaders });
  }
  const directoryCount = optional.getUint32(108, true);
  if (directoryCount > MAX_DIRECTORIES || OPTIONAL_FIXED_SIZE + directoryCount * 8 > optionalSize) {
    throw imageInvalid(`${directoryCount} data directories do not fit`, { directoryCount });
  }
  const directories = Array.from({ length: directoryCount }, (_, index) => ({
    rva: optional.getUint32(OPTIONAL_FIXED_SIZE + index * 8, true),
    size: optional.getUint32(OPTIONAL_FIXED_SIZE + index * 8 + 4, true),
  }));

  return {
    entryPoint: optional.getUint32(16, true),
    imageBase: optional.getBigUint64(24, true),
    sizeOfImage,
    sizeOfHeaders,
    checksum: optional.getUint32(64, true),
    timeDateStamp,
    directories,
    sections: parseSections(
      read(sectionsStart, sectionCount * SECTION_HEADER_SIZE),
      sizeOfHeaders,
      sizeOfImage,
    ),
  };
}

function checkMachine(machine: number): void {
  if (machine === MACHINE_AMD64) return;
  const name = MACHINE_NAMES.get(machine) ?? `machine type ${hex(machine)}`;
  throw new MemtablesError('GUEST_UNSUPPORTED', `the image is for ${name}, not for x86-64`, {
    remedy: 'Only 64-bit x86 images and guests are supported.',
    context: { machine },
  });
}

function parseSections(table: Uint8Array, sizeOfHeaders: number, sizeOfImage: number): RawSection[] {
  const view = viewOf(table);
  const sections: RawSection[] = [];
  let previousEnd = sizeOfHeaders;
  for (let index = 0; index * SECTION_HEADER_SIZE < table.length; index++) {
    const at = index * SECTION_HEADER_SIZE;
    const name = Buffer.from(table.subarray(at, at + 8))
      .toString('latin1')
      .replace(/\0.*$/s, '');
    const rawSize = view.getUint32(at + 16, true);
    const virtualSize = view.getUint32(at + 8, true) || rawSize;
    const rva = view.getUint32(at + 12, true);
    const characteristics = view.getUint32(at + 36, true);
    if (rva < previousEnd || rva + virtualSize > sizeOfImage) {
      throw imageInvalid(`section ${name} overlaps its predecessor or leaves the image`, {
        section: name,
        rva,
        virtualSize,
        previousEnd,
        sizeOfImage,
      });
    }
    previousEnd = rva + virtualSize;
    sections.push({
      index,
      name,
      rva,
      virtualSize,
      characteristics,
      executable: (characteristics & SECTION_EXECUTE) !== 0,
      writable: (characteristics & SECTION_WRITE) !== 0,
      discardable: (characteristics & SECTION_DISCARDABLE) !== 0,
      notPaged: (characteristics & SECTION_NOT_PAGED) !== 0,
      rawOffset: Math.floor(view.getUint32(at + 20, true) / FILE_SECTOR) * FILE_SECTOR,
      rawSize: Math.min(rawSize, virtualSize),
    });
  }
  return sections;
}

/** What the loader would put at `rva`: bytes of the file, zeros where it holds none. */
function readFileLayout(file: Uint8Array, headers: Headers, rva: number, length: number): Uint8Array {
  const result = new Uint8Array(length);
  const copy = (start: number, size: number, offset: number) => {
    const from = Math.max(rva, start);
    const to = Math.min(rva + length, start + size);
    if (from < to) result.set(file.subarray(offset + from - start, offset + to - start), from - rva);
  };
  copy(0, headers.sizeOfHeaders, 0);
  for (const section of headers.sections) copy(section.rva, section.rawSize, section.rawOffset);
  return result;
}

function slice(bytes: Uint8Array, offset: number, length: number, what: string): Uint8Array {
  if (offset + length > bytes.length) {
    throw imageInvalid(`the file ends inside ${what}`, { offset, length, fileSize: bytes.length });
  }
  return bytes.subarray(offset, offset + length);
}

function guidDigits(guid: Buffer): string {
  const head = [guid.readUInt32LE(0), guid.readUInt16LE(4), guid.readUInt16LE(6)];
  return (
    head.map((part, index) => part.toString(16).padStart(index === 0 ? 8 : 4, '0')).join('') +
    guid.toString('hex', 8)
  ).toUpperCase();
}

export function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

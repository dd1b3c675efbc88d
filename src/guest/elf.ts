import { type Gpa, PAGE_SIZE } from '../vmi/address.js';

/** Memory that is loaded where it says. */
export interface Segment {
  readonly gpa: Gpa;
  /** Whole pages. */
  readonly bytes: Buffer;
}

/** What a file tells its loader. */
export interface ElfNote {
  /** Whose the number of its type is. */
  readonly owner: string;
  readonly type: number;
  readonly descriptor: Buffer;
}

const HEADER_BYTES = 64;
export const PROGRAM_HEADER_BYTES = 56;
const NOTE_HEADER_BYTES = 12;
const NOTE_ALIGNMENT = 4;
const EXECUTABLE = 2;
const X86_64 = 62;
const VERSION = 1;
export const PT_LOAD = 1;
const PT_NOTE = 4;
const READ = 4;
const READ_WRITE_EXECUTE = 7;

/** An ELF64 file that is loaded by physical address. */
export function elfFile(entry: Gpa, note: ElfNote, segments: readonly Segment[]): Buffer {
  const noteBytes = encodeNote(note);
  const noteOffset = HEADER_BYTES + PROGRAM_HEADER_BYTES * (1 + segments.length);
  const headers = Buffer.alloc(roundUp(noteOffset + noteBytes.length, PAGE_SIZE));
  headers.write('\x7fELF', 'latin1');
  headers.set([2, 1, VERSION], 4); // 64 bits, little-endian
  headers.writeUInt16LE(EXECUTABLE, 16);
  headers.writeUInt16LE(X86_64, 18);
  headers.writeUInt32LE(VERSION, 20);
  headers.writeBigUInt64LE(entry, 24);
  headers.writeBigUInt64LE(BigInt(HEADER_BYTES), 32);
  headers.writeUInt16LE(HEADER_BYTES, 52);
  headers.writeUInt16LE(PROGRAM_HEADER_BYTES, 54);
  headers.writeUInt16LE(1 + segments.length, 56);
  noteBytes.copy(headers, noteOffset);

  let programHeader = HEADER_BYTES;
  const describe = (
    type: number,
    flags: number,
    offset: number,
    gpa: Gpa,
    size: number,
    alignment: number,
  ) => {
    headers.writeUInt32LE(type, programHeader);
    headers.writeUInt32LE(flags, programHeader + 4);
    const fields = [offset, gpa, gpa, size, size, alignment];
    fields.forEach((field, index) => {
      headers.writeBigUInt64LE(BigInt(field), programHeader + 8 + index * 8);
    });
    programHeader += PROGRAM_HEADER_BYTES;
  };
  describe(PT_NOTE, READ, noteOffset, 0n, noteBytes.length, NOTE_ALIGNMENT);
  let offset = headers.length;
  for (const { gpa, bytes } of segments) {
    describe(PT_LOAD, READ_WRITE_EXECUTE, offset, gpa, bytes.length, PAGE_SIZE);
    offset += bytes.length;
  }
  return Buffer.concat([headers, ...segments.map(({ bytes }) => bytes)]);
}

function encodeNote({ owner, type, descriptor }: ElfNote): Buffer {
  const name = Buffer.from(`${owner}\0`, 'latin1');
  const descriptorAt = NOTE_HEADER_BYTES + roundUp(name.length, NOTE_ALIGNMENT);
  const note = Buffer.alloc(descriptorAt + roundUp(descriptor.length, NOTE_ALIGNMENT));
  note.writeUInt32LE(name.length, 0);
  note.writeUInt32LE(descriptor.length, 4);
  note.writeUInt32LE(type, 8);
  name.copy(note, NOTE_HEADER_BYTES);
  descriptor.copy(note, descriptorAt);
  return note;
}

function roundUp(size: number, unit: number): number {
  return Math.ceil(size / unit) * unit;
}

import { describe, expect, test } from 'vitest';
import { compressedKernelIn, loadableOnly } from '../../src/xen-rig/dom0-kernel.js';

const HEADER = 64;
const PROGRAM_HEADER = 56;
const PT_LOAD = 1;
const PT_NOTE = 4;

interface Segment {
  readonly type: number;
  readonly offset: number;
  readonly fileBytes: number;
  readonly memoryBytes: number;
}

function elfOf(segments: readonly Segment[], bytes: Buffer): Buffer {
  const elf = Buffer.from(bytes);
  elf.write('\x7fELF', 'latin1');
  elf.writeBigUInt64LE(BigInt(HEADER), 0x20);
  elf.writeBigUInt64LE(0x3000n, 0x28); // section headers
  elf.writeUInt16LE(segments.length, 0x38);
  elf.writeUInt16LE(7, 0x3c);
  segments.forEach(({ type, offset, fileBytes, memoryBytes }, index) => {
    const at = HEADER + index * PROGRAM_HEADER;
    elf.writeUInt32LE(type, at);
    elf.writeBigUInt64LE(BigInt(offset), at + 0x08);
    elf.writeBigUInt64LE(BigInt(fileBytes), at + 0x20);
    elf.writeBigUInt64LE(BigInt(memoryBytes), at + 0x28);
  });
  return elf;
}

function segmentsOf(elf: Buffer): (Segment & { readonly bytes: Buffer })[] {
  return Array.from({ length: elf.readUInt16LE(0x38) }, (_, index) => {
    const at = HEADER + index * PROGRAM_HEADER;
    const offset = Number(elf.readBigUInt64LE(at + 0x08));
    const fileBytes = Number(elf.readBigUInt64LE(at + 0x20));
    return {
      type: elf.readUInt32LE(at),
      offset,
      fileBytes,
      memoryBytes: Number(elf.readBigUInt64LE(at + 0x28)),
      bytes: elf.subarray(offset, offset + fileBytes),
    };
  });
}

describe('a kernel cut down to what is loaded', () => {
  const file = Buffer.alloc(0x4000);
  file.fill(0xaa, 0x1000, 0x1800); // then zeroes up to 0x2000
  file.fill(0xbb, 0x1400, 0x1420); // the notes
  file.fill(0xcc, 0x2000, 0x2100);
  file.fill(0xee, 0x3000, 0x4000); // section headers and symbols
  const elf = elfOf(
    [
      { type: PT_NOTE, offset: 0x1400, fileBytes: 0x20, memoryBytes: 0x20 },
      { type: PT_LOAD, offset: 0x1000, fileBytes: 0x1000, memoryBytes: 0x1000 },
      { type: PT_LOAD, offset: 0x2000, fileBytes: 0x100, memoryBytes: 0x900 },
    ],
    file,
  );
  const small = loadableOnly(elf);
  const [notes, first, second] = segmentsOf(small);

  test('has every byte of its segments, as much in memory as before, and zeroes where the file ends', () => {
    expect(first).toMatchObject({ fileBytes: 0x800, memoryBytes: 0x1000 });
    expect(first!.bytes).toEqual(file.subarray(0x1000, 0x1800));
    expect(second).toMatchObject({ fileBytes: 0x100, memoryBytes: 0x900 });
    expect(second!.bytes).toEqual(file.subarray(0x2000, 0x2100));
  });

  test('has its notes where they are now: Xen takes the entry point from them', () => {
    expect(notes!.bytes).toEqual(Buffer.alloc(0x20, 0xbb));
  });

  test('has no symbols, and no headers of sections that are gone', () => {
    expect(small.length).toBe(HEADER + 3 * PROGRAM_HEADER + 0x900);
    expect([small.readBigUInt64LE(0x28), small.readUInt16LE(0x3c)]).toEqual([0n, 0]);
  });
});

test('the compressed kernel lies behind the real-mode code, without the length that follows it', () => {
  const bzImage = Buffer.alloc(0x3000);
  bzImage.writeUInt8(7, 0x1f1); // sectors of real-mode code, besides the first
  bzImage.writeUInt32LE(0x40, 0x248);
  bzImage.writeUInt32LE(0x104, 0x24c);
  bzImage.fill(0xdd, 0x1040, 0x1140);
  expect(compressedKernelIn(bzImage)).toEqual(Buffer.alloc(0x100, 0xdd));
});

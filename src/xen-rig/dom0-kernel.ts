// Takes the kernel out of its self-extracting file: nothing is to be decompressed inside the emulator, nor more loaded
// from its CD than has to be.
import { PROGRAM_HEADER_BYTES, PT_LOAD } from '../guest/elf.js';

const SETUP_SECTORS = 0x1f1;
const PAYLOAD_OFFSET = 0x248;
const PAYLOAD_LENGTH = 0x24c;
const SECTOR = 512;
/** Behind the compressed stream there is the length of what is in it. */
const LENGTH_BYTES = 4;

/** The compressed ELF image in a bzImage, by Linux's boot protocol. */
export function compressedKernelIn(bzImage: Buffer): Buffer {
  const start = (bzImage.readUInt8(SETUP_SECTORS) + 1) * SECTOR + bzImage.readUInt32LE(PAYLOAD_OFFSET);
  return bzImage.subarray(start, start + bzImage.readUInt32LE(PAYLOAD_LENGTH) - LENGTH_BYTES);
}

/** The ELF image without what is not loaded, and without the zeroes at the ends of its segments. */
export function loadableOnly(elf: Buffer): Buffer {
  const tableAt = Number(elf.readBigUInt64LE(0x20));
  const count = elf.readUInt16LE(0x38);
  const headers = Buffer.from(elf.subarray(0, tableAt + count * PROGRAM_HEADER_BYTES));
  // No section headers any more.
  headers.writeBigUInt64LE(0n, 0x28);
  headers.writeUInt32LE(0, 0x3c);
  const pieces: Buffer[] = [headers];
  let end = headers.length;
  /** Where the segments' bytes have gone. */
  const moved: { from: number; to: number; bytes: number }[] = [];
  const segments = Array.from({ length: count }, (_, index) => tableAt + index * PROGRAM_HEADER_BYTES);
  for (const at of segments.filter((at) => elf.readUInt32LE(at) === PT_LOAD)) {
    const from = Number(elf.readBigUInt64LE(at + 0x08));
    const bytes = withoutZeroes(elf, from, Number(elf.readBigUInt64LE(at + 0x20)));
    headers.writeBigUInt64LE(BigInt(end), at + 0x08);
    headers.writeBigUInt64LE(BigInt(bytes), at + 0x20);
    pieces.push(elf.subarray(from, from + bytes));
    moved.push({ from, to: end, bytes });
    end += bytes;
  }
  // The others, such as notes, lie inside of those.
  for (const at of segments.filter((at) => elf.readUInt32LE(at) !== PT_LOAD)) {
    const from = Number(elf.readBigUInt64LE(at + 0x08));
    const home = moved.find((piece) => from >= piece.from && from < piece.from + piece.bytes);
    if (home !== undefined) headers.writeBigUInt64LE(BigInt(from - home.from + home.to), at + 0x08);
  }
  return Buffer.concat(pieces);
}

function withoutZeroes(elf: Buffer, from: number, length: number): number {
  let bytes = length;
  while (bytes > 0 && elf[from + bytes - 1] === 0) bytes--;
  return bytes;
}

import { PAGE } from '../kvmi/peer.js';

export const FRAMES = 64;

/** Memory of which each page looks different. */
export function pattern(): Buffer {
  const memory = Buffer.alloc(FRAMES * PAGE);
  for (let i = 0; i < memory.length; i++) memory[i] = (i * 7 + (i >> 12)) & 0xff;
  return memory;
}

export const ROOT = 0x1000;
export const PRESENT = 1n;
export const LARGE = 0x80n;
export const NO_EXECUTE = 1n << 63n;
/** A kernel address with different indexes at every level. */
export const VA = 0xfffff803_45678abcn;

const indexAt = (va: bigint, shift: bigint) => Number((va >> shift) & 511n);

/** Where the last entry for `VA` lies. */
export const PT_ENTRY = 0x4000 + 8 * indexAt(VA, 12n);

/** Tables at 0x1000 to 0x4000, of which a test changes single entries. */
export function tables(entries: { pml4?: bigint; pdpt?: bigint; pd?: bigint; pt?: bigint } = {}): Buffer {
  const memory = pattern();
  memory.fill(0, ROOT, ROOT + 4 * PAGE);
  const levels: [number, bigint, bigint][] = [
    [ROOT, 39n, entries.pml4 ?? 0x2000n | PRESENT],
    [0x2000, 30n, entries.pdpt ?? 0x3000n | PRESENT],
    [0x3000, 21n, entries.pd ?? 0x4000n | PRESENT],
    [0x4000, 12n, entries.pt ?? 0x9000n | PRESENT],
  ];
  for (const [table, shift, entry] of levels) memory.writeBigUInt64LE(entry, table + 8 * indexAt(VA, shift));
  return memory;
}

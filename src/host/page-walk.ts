import type { Machine } from '../machine/machine.js';
import type { Gpa, Gva } from '../vmi/address.js';

const PRESENT = 1n;
const LARGE = 1n << 7n;
const FRAME_BITS = 0x000f_ffff_ffff_f000n;
const INDEX_BITS = 9n;
const INDEX_MASK = 0x1ffn;
const ENTRY_SIZE = 8n;
/** Where the index into a table of each level begins in an address: PML4, PDPT, PD, PT. */
const LEVEL_SHIFTS = [39n, 30n, 21n, 12n] as const;

/** Walks four-level page tables, user bits and permissions aside; `undefined` where nothing is mapped. */
export function translate(
  machine: Pick<Machine, 'readPhysical' | 'memoryBytes'>,
  pageTable: Gpa,
  gva: Gva,
): Gpa | undefined {
  let table = pageTable & FRAME_BITS;
  for (const shift of LEVEL_SHIFTS) {
    const at = table + ((gva >> shift) & INDEX_MASK) * ENTRY_SIZE;
    if (at >= BigInt(machine.memoryBytes)) return undefined;
    const entry = machine.readPhysical(at, Number(ENTRY_SIZE)).readBigUInt64LE();
    if ((entry & PRESENT) === 0n) return undefined;
    const isPage = shift === 12n || ((entry & LARGE) !== 0n && shift <= 12n + 2n * INDEX_BITS);
    if (isPage) {
      const offset = (1n << shift) - 1n;
      const gpa = (entry & FRAME_BITS & ~offset) | (gva & offset);
      return gpa < BigInt(machine.memoryBytes) ? gpa : undefined;
    }
    table = entry & FRAME_BITS;
  }
  return undefined;
}

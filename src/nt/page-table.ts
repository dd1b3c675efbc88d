import type { Gpa } from '../vmi/address.js';

/** Bits 12 to 51: below are the PCID and flags, above the no-flush bit that NT keeps in saved roots. */
const ROOT_ADDRESS_MASK = 0x000f_ffff_ffff_f000n;

/** The physical address of the page table that a CR3 or a DirectoryTableBase names. */
export function pageTableRoot(cr3: bigint): Gpa {
  return cr3 & ROOT_ADDRESS_MASK;
}

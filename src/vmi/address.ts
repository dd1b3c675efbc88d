/** A guest virtual address. */
export type Gva = bigint;
/** A guest physical address. */
export type Gpa = bigint;
/** A guest frame number: a GPA shifted right by 12. */
export type Gfn = bigint;

export const PAGE_SIZE = 4096;
export const PAGE_SHIFT = 12n;
const OFFSET_MASK = 0xfffn;

export function gfnOf(gpa: Gpa): Gfn {
  return gpa >> PAGE_SHIFT;
}

export function gpaOfFrame(gfn: Gfn): Gpa {
  return gfn << PAGE_SHIFT;
}

/** The offset inside a 4 KB page, of a virtual or a physical address. */
export function pageOffset(address: bigint): number {
  return Number(address & OFFSET_MASK);
}

/** The address of the page that holds `address`. */
export function pageBase(address: bigint): bigint {
  return address & ~OFFSET_MASK;
}

/** `0x…`, as addresses are written in JSON and in messages. */
export function hex(value: bigint | number): string {
  return `0x${value.toString(16)}`;
}

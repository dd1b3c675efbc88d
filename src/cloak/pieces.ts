import { type Gpa, type Gva, PAGE_SIZE, pageOffset } from '../vmi/address.js';

/** The part of a range that lies on one page. */
export interface PagePiece {
  readonly gva: Gva;
  readonly gpa: Gpa;
  /** Where the piece begins in the range. */
  readonly offset: number;
  readonly length: number;
}

/** Splits a virtual range at page ends; neighbouring pages may lie in frames that are none. */
export function splitByPage(gva: Gva, length: number, translate: (gva: Gva) => Gpa): PagePiece[] {
  const pieces: PagePiece[] = [];
  for (let offset = 0; offset < length; ) {
    const at = gva + BigInt(offset);
    const piece = Math.min(PAGE_SIZE - pageOffset(at), length - offset);
    pieces.push({ gva: at, gpa: translate(at), offset, length: piece });
    offset += piece;
  }
  return pieces;
}

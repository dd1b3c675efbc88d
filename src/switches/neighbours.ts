// Where a table ends, told by what lies behind it.
import type { ImageBytes } from '../nt/pe.js';
import { type Analysis, DWORD, MAX_ENTRIES, readEntries, type TableLoad } from './analysis.js';
import { rangeAt } from './functions.js';

export interface TableEnd {
  readonly entries: number;
  /** What follows the last entry is another table, or leads to no code; otherwise `entries` is a guess. */
  readonly definite: boolean;
}

/**
 * The entries of `load`'s dword table, if the index is left out of account: dwords that are 0 or where an instruction
 * of the function begins, up to another table, code, or any other dword.
 */
export function dwordTableEnd(image: ImageBytes, analysis: Analysis, load: TableLoad): TableEnd {
  const { table } = load;
  const view = readEntries(image, table, Math.floor(roomAt(image, analysis, table) / DWORD));
  const most = view.byteLength / DWORD;
  let entries = 0;
  let cases = 0;
  for (; entries < most; entries++) {
    const entry = view.getUint32(entries * DWORD, true);
    if (entry === 0) continue; // an unreachable case
    if (!analysis.isInstruction(entry)) break;
    cases++;
  }
  if (cases === 0) return { entries: 0, definite: false };
  const end = table + entries * DWORD;
  const ends = entries < MAX_ENTRIES && (analysis.nextTable(end) === end || !leadsToCode(image, end));
  return { entries, definite: ends && (isNonNegative(load) || !leadsToCode(image, table - DWORD)) };
}

/** Otherwise the table may begin before what the load names: of a `case -1`, the compiler adds the 1 to that. */
export function isNonNegative({ maxIndex }: TableLoad): boolean {
  return Number.isFinite(maxIndex);
}

/** What lies at `rva` might be an entry: of a case that was moved away from its function, say. */
function leadsToCode(image: ImageBytes, rva: number): boolean {
  const view = readEntries(image, rva, 1);
  return view.byteLength > 0 && image.sectionAt(view.getUint32(0, true))?.executable === true;
}

/** The length of the byte table of `load`, whose bytes are indices of `dwords` dwords. */
export function byteTableEnd(
  image: ImageBytes,
  analysis: Analysis,
  { table }: TableLoad,
  dwords: number,
): number {
  const bytes = image.read(table, roomAt(image, analysis, table));
  const end = bytes.findIndex((byte) => byte >= dwords);
  return end === -1 ? bytes.length : end;
}

/** For how many bytes from `table` on there is neither known code nor the start of another known table. */
export function roomAt(image: ImageBytes, analysis: Analysis, table: number): number {
  const section = image.sectionAt(table);
  if (section === undefined || analysis.overlapsCode(table, table)) return 0;
  const end = Math.min(
    table + MAX_ENTRIES * DWORD,
    section.rva + section.virtualSize,
    analysis.nextTable(table + 1) ?? section.rva + section.virtualSize,
    // A function's tables lie in its fragments, or all behind them.
    rangeAt(analysis.code.ranges, table)?.end ?? section.rva + section.virtualSize,
  );
  let rva = table;
  while (rva < end && !analysis.instructions.has(rva)) rva++;
  return rva - table;
}

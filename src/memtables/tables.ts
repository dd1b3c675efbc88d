import type { CodeRange } from '../switches/functions.js';
import type { FoundSwitch } from '../switches/table.js';

const ENTRY_BYTES = 4;

/** A table, and where the load that reads it is. */
export interface Table extends CodeRange {
  readonly load: number;
}

/** The tables of a switch: first that of dwords. */
export function tablesOf({ rva, table, entries, byteTable }: FoundSwitch): Table[] {
  const dwords = { load: rva, begin: table, end: table + entries * ENTRY_BYTES };
  if (byteTable === undefined) return [dwords];
  const { rva: load, table: begin } = byteTable;
  return [dwords, { load, begin, end: begin + byteTable.entries }];
}

import { readFileSync, statSync } from 'node:fs';
import { MemtablesError } from '../errors.js';
import { PeImage } from '../nt/pe.js';
import { scanImage } from '../switches/scan.js';
import type { RefusalReason, SwitchSite } from '../switches/table.js';
import { hex } from '../vmi/address.js';
import { toJson } from './output.js';

/** The `seed` handler: a header, and a block an entry. */
const HANDLER_HEADER = 47;
const HANDLER_BLOCK = 11;
const MAX_FILE_SIZE = 2 ** 30;
/** Tables that are no reads of code pages: they are listed, but there is nothing to relocate. */
const NOT_IN_CODE: ReadonlySet<RefusalReason> = new Set([
  'table-outside-image',
  'table-not-in-executable-section',
]);

interface Lines {
  write(text: string): unknown;
}

/**
 * Writes the switch-table loads of a PE64 file to `out`: JSON lines (a `site` each, then a `summary`), or
 * a table for a person.
 * @throws MemtablesError `FILE_UNREADABLE`, `IMAGE_INVALID`, `GUEST_UNSUPPORTED`
 */
export function scanFile(path: string, options: { readonly json?: boolean | undefined }, out: Lines): void {
  const image = PeImage.fromFile(readImageFile(path));
  const sites = scanImage(image);
  const summary = summarise(path, sites);
  if (options.json) {
    for (const site of sites) out.write(`${toJson(siteRecord(image, site))}\n`);
    out.write(`${toJson(summary)}\n`);
    return;
  }
  out.write(siteTable(image, sites));
  out.write(summaryText(summary));
}

function readImageFile(path: string): Uint8Array {
  try {
    const stat = statSync(path);
    if (!stat.isFile()) throw new Error('it is not a file');
    if (stat.size > MAX_FILE_SIZE) throw new Error('it is larger than any image');
    return readFileSync(path);
  } catch (error) {
    throw new MemtablesError('FILE_UNREADABLE', `cannot read ${path}: ${(error as Error).message}`, {
      remedy: 'Name a file that exists and that you may read.',
      context: { path },
      cause: error,
    });
  }
}

function siteRecord(image: PeImage, site: SwitchSite): Record<string, unknown> {
  const head = {
    type: 'site',
    rva: hex(site.rva),
    section: image.sectionAt(site.rva)?.name,
    form: site.form,
    table: site.table === undefined ? undefined : hex(site.table),
    tableSection: site.table === undefined ? undefined : image.sectionAt(site.table)?.name,
    proven: site.proven,
  };
  if (!site.proven) return { ...head, reason: site.reason };
  return {
    ...head,
    entries: site.entries,
    byteTable: site.byteTable && { rva: hex(site.byteTable.table), entries: site.byteTable.entries },
    destination: site.destination,
    base: site.base,
    index: site.index,
    length: site.length,
    back: hex(site.back),
    adjacent: site.adjacent,
    isBranchTarget: site.isBranchTarget,
    handlerBytes: handlerBytes(site.entries),
  };
}

interface Summary extends Record<string, unknown> {
  readonly type: 'summary';
  readonly file: string;
  /** Loads whose table lies in code, by form. */
  readonly loads: Record<'one-level' | 'two-level', number>;
  readonly proven: Record<'one-level' | 'two-level', number>;
  /** Of the loads whose table lies in code. */
  readonly refused: Partial<Record<RefusalReason, number>>;
  /** Loads whose table lies elsewhere. */
  readonly notInCode: number;
  /** Of proven tables. */
  readonly entries: { median: number; p90: number; p99: number; max: number } | undefined;
  readonly handlerBytes: number;
}

function summarise(file: string, sites: readonly SwitchSite[]): Summary {
  const loads = { 'one-level': 0, 'two-level': 0 };
  const proven = { 'one-level': 0, 'two-level': 0 };
  const refused: Partial<Record<RefusalReason, number>> = {};
  const lengths: number[] = [];
  let notInCode = 0;
  for (const site of sites) {
    if (!site.proven && NOT_IN_CODE.has(site.reason)) {
      notInCode++;
      continue;
    }
    loads[site.form ?? 'one-level']++;
    if (site.proven) {
      proven[site.form]++;
      lengths.push(site.entries);
    } else refused[site.reason] = (refused[site.reason] ?? 0) + 1;
  }
  lengths.sort((a, b) => a - b);
  const at = (share: number) => lengths[Math.ceil(lengths.length * share) - 1]!;
  return {
    type: 'summary',
    file,
    loads,
    proven,
    refused,
    notInCode,
    entries: lengths.length === 0 ? undefined : { median: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1) },
    handlerBytes: lengths.reduce((sum, entries) => sum + handlerBytes(entries), 0),
  };
}

function handlerBytes(entries: number): number {
  return HANDLER_HEADER + HANDLER_BLOCK * entries;
}

const COLUMNS = ['load', 'section', 'form', 'table', 'entries', 'handler', 'end'] as const;

function siteTable(image: PeImage, sites: readonly SwitchSite[]): string {
  if (sites.length === 0) return '';
  const rows = sites.map((site) => [
    hex(site.rva),
    image.sectionAt(site.rva)?.name ?? '',
    site.form ?? '',
    site.table === undefined ? '' : hex(site.table),
    site.proven ? String(site.entries) : '',
    site.proven ? `${handlerBytes(site.entries)} B` : '',
    site.proven ? 'proven' : `refused: ${site.reason}`,
  ]);
  const widths = COLUMNS.map((column, index) =>
    Math.max(column.length, ...rows.map((row) => row[index]!.length)),
  );
  const line = (cells: readonly string[]) =>
    cells
      .map((cell, index) => cell.padEnd(widths[index]!))
      .join('  ')
      .trimEnd();
  return `${[COLUMNS, ...rows].map(line).join('\n')}\n\n`;
}

function summaryText({
  file,
  loads,
  proven,
  refused,
  notInCode,
  entries,
  handlerBytes: bytes,
}: Summary): string {
  const total = loads['one-level'] + loads['two-level'];
  const provenTotal = proven['one-level'] + proven['two-level'];
  const lines = [
    `${file}: ${total} table loads (${loads['one-level']} one-level, ${loads['two-level']} two-level)`,
    `  end proven    ${provenTotal} (${proven['one-level']} one-level, ${proven['two-level']} two-level)`,
  ];
  for (const [reason, count] of Object.entries(refused)) lines.push(`  refused       ${count} ${reason}`);
  if (notInCode > 0) lines.push(`  not in code   ${notInCode} (nothing to relocate)`);
  if (entries !== undefined) {
    const { median, p90, p99, max } = entries;
    lines.push(`  entries       median ${median}, p90 ${p90}, p99 ${p99}, max ${max}`);
    lines.push(`  handlers      ${bytes} bytes in all`);
  }
  return `${lines.join('\n')}\n`;
}

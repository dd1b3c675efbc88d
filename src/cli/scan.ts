import { readFileSync, statSync } from 'node:fs';
import { MemtablesError } from '../errors.js';
import { affordable, type Candidate, planHandlers } from '../handlers/planner.js';
import { MAX_ENTRIES } from '../handlers/refusal.js';
import { PeImage } from '../nt/pe.js';
import { scanImage } from '../switches/scan.js';
import type { FoundSwitch, RefusalReason, RefusedSwitch, SwitchSite } from '../switches/table.js';
import { hex } from '../vmi/address.js';
import { EXIT } from './exit-codes.js';
import { reportError, toJson } from './output.js';
import { LOAD_REFUSALS } from './reasons.js';

const MAX_FILE_SIZE = 2 ** 30;

interface Lines {
  write(text: string): unknown;
}

/**
 * Writes the switch-table loads of PE64 files to `out`: JSON lines (a `site` each, then a `summary`), or a table for a
 * person. A file that cannot be scanned is said on stderr, and the others are scanned all the same.
 *
 * @returns the exit code: that of the first such file
 */
export function scanFiles(
  paths: readonly string[],
  options: { readonly json?: boolean | undefined },
  out: Lines,
): number {
  let code: number = EXIT.ok;
  paths.forEach((path, index) => {
    try {
      scanFile(path, options, out, index > 0);
    } catch (error) {
      const own = reportError(error);
      code ||= own;
    }
  });
  return code;
}

/** @throws MemtablesError `FILE_UNREADABLE`, `IMAGE_INVALID`, `GUEST_UNSUPPORTED` */
export function scanFile(
  path: string,
  options: { readonly json?: boolean | undefined },
  out: Lines,
  apart = false,
): void {
  const { image, sites } = scan(path);
  const summary = summarise(path, image, sites);
  if (options.json) {
    for (const site of sites) out.write(`${toJson(siteRecord(path, image, site))}\n`);
    out.write(`${toJson(summary)}\n`);
    return;
  }
  if (apart) out.write('\n');
  out.write(header(path, image));
  out.write(siteTable(image, sites));
  out.write(summaryText(summary));
}

/** A load, with the fastest handler if slack were no question: none where the table has too many entries for any. */
type ListedSite = (FoundSwitch & { readonly handler: Candidate | undefined }) | RefusedSwitch;

/** Of several files, an error has to say which. */
function scan(path: string): { readonly image: PeImage; readonly sites: readonly ListedSite[] } {
  const bytes = readImageFile(path);
  try {
    const image = PeImage.fromFile(bytes);
    const sites = scanImage(image).map((site) =>
      site.found ? { ...site, handler: handlerOf(image, site) } : site,
    );
    return { image, sites };
  } catch (cause) {
    if (!(cause instanceof MemtablesError)) throw cause;
    const { code, message, remedy, context } = cause;
    throw new MemtablesError(code, `${path}: ${message}`, { remedy, context, cause: cause.cause });
  }
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

function siteRecord(file: string, image: PeImage, site: ListedSite): Record<string, unknown> {
  const head = {
    type: 'site',
    file,
    rva: hex(site.rva),
    section: image.sectionAt(site.rva)?.name,
    form: site.form,
    table: site.table === undefined ? undefined : hex(site.table),
    tableSection: site.table === undefined ? undefined : image.sectionAt(site.table)?.name,
    proven: site.found,
  };
  if (!site.found) return { ...head, reason: site.reason };
  const { handler } = site;
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
    ...(handler && { encoder: handler.encoder, handlerBytes: handler.size }),
  };
}

function handlerOf(image: PeImage, site: FoundSwitch): Candidate | undefined {
  return affordable(planHandlers(site, image.imageBase, 'auto'), Infinity)[0];
}

/** Reads of a table that lies elsewhere never trap: there is nothing to relocate. */
function isInCode(image: PeImage, { table }: SwitchSite): boolean {
  return table === undefined || image.sectionAt(table)?.executable === true;
}

interface Summary extends Record<string, unknown> {
  readonly type: 'summary';
  readonly file: string;
  /** Loads whose table lies in code, by form. */
  readonly loads: Record<'one-level' | 'two-level', number>;
  readonly proven: Record<'one-level' | 'two-level', number>;
  /** Of the proven: tables with more entries than a handler has blocks. */
  readonly tooManyEntries: number;
  /** Of the loads whose table lies in code. */
  readonly refused: Partial<Record<RefusalReason, number>>;
  /** Loads whose table lies elsewhere. */
  readonly notInCode: number;
  /** Of proven tables. */
  readonly entries: { median: number; p90: number; p99: number; max: number } | undefined;
  /** Of all tables that could be relocated; the fastest handler of each. */
  readonly handlerBytes: number;
}

function summarise(file: string, image: PeImage, sites: readonly ListedSite[]): Summary {
  const loads = { 'one-level': 0, 'two-level': 0 };
  const proven = { 'one-level': 0, 'two-level': 0 };
  const refused: Partial<Record<RefusalReason, number>> = {};
  const lengths: number[] = [];
  const handlers: (number | undefined)[] = [];
  let notInCode = 0;
  for (const site of sites) {
    if (!isInCode(image, site)) {
      notInCode++;
      continue;
    }
    loads[site.form ?? 'one-level']++;
    if (site.found) {
      proven[site.form]++;
      lengths.push(site.entries);
      handlers.push(site.handler?.size);
    } else refused[site.reason] = (refused[site.reason] ?? 0) + 1;
  }
  lengths.sort((a, b) => a - b);
  const at = (share: number) => lengths[Math.ceil(lengths.length * share) - 1]!;
  return {
    type: 'summary',
    file,
    loads,
    proven,
    tooManyEntries: handlers.filter((size) => size === undefined).length,
    refused,
    notInCode,
    entries: lengths.length === 0 ? undefined : { median: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1) },
    handlerBytes: handlers.reduce<number>((sum, size) => sum + (size ?? 0), 0),
  };
}

const COLUMNS = ['load', 'section', 'form', 'table', 'entries', 'handler', 'end of the table'] as const;
/** Columns of numbers. */
const RIGHT_ALIGNED: ReadonlySet<number> = new Set([0, 3, 4, 5]);
const INDENT = '  ';

function header(path: string, image: PeImage): string {
  const code = image.sections.filter(({ executable }) => executable);
  const bytes = code.reduce((sum, { virtualSize }) => sum + virtualSize, 0);
  const where = code.map(({ name }) => name).join(', ');
  const text = code.length === 0 ? 'no code' : `${Math.ceil(bytes / 1024)} KB of code in ${where}`;
  return `${path}: x86-64 image, ${text}\n\n`;
}

/** The loads whose table lies in code, a line each: the others are only counted. */
function siteTable(image: PeImage, sites: readonly ListedSite[]): string {
  const listed = sites.filter((site) => isInCode(image, site));
  if (listed.length === 0) return '';
  const rows = listed.map((site) => [
    hex(site.rva),
    image.sectionAt(site.rva)?.name ?? '',
    site.form ?? '',
    site.table === undefined ? '' : hex(site.table),
    site.found ? String(site.entries) : '-',
    site.found && site.handler ? `${site.handler.size} B` : '-',
    site.found ? 'proven' : `refused: ${LOAD_REFUSALS[site.reason]}`,
  ]);
  const widths = COLUMNS.map((column, index) =>
    rows.reduce((width, row) => Math.max(width, row[index]!.length), column.length),
  );
  const line = (cells: readonly string[]) =>
    INDENT +
    cells
      .map((cell, index) =>
        RIGHT_ALIGNED.has(index) ? cell.padStart(widths[index]!) : cell.padEnd(widths[index]!),
      )
      .join('  ')
      .trimEnd();
  const rule = widths.map((width) => '-'.repeat(width));
  return `${[COLUMNS, rule, ...rows].map(line).join('\n')}\n\n`;
}

function summaryText(summary: Summary): string {
  const { loads, proven, tooManyEntries, refused, notInCode, entries, handlerBytes } = summary;
  const count = (forms: Summary['loads']) => {
    const total = forms['one-level'] + forms['two-level'];
    return `${total} (${forms['one-level']} one-level, ${forms['two-level']} two-level)`;
  };
  const lines = [['switch tables in code', count(loads)]];
  lines.push(['  end proven', `${count(proven)}${tooManyEntries === 0 ? ': could be relocated' : ''}`]);
  if (tooManyEntries > 0) {
    lines.push(['  too large', `${tooManyEntries} of these: a handler has at most ${MAX_ENTRIES} entries`]);
  }
  for (const [reason, number] of Object.entries(refused)) {
    lines.push(['  refused', `${number}: ${LOAD_REFUSALS[reason as RefusalReason]}`]);
  }
  if (notInCode > 0)
    lines.push(['switch tables elsewhere', `${notInCode}: reads of them never trap, nothing to do`]);
  if (entries !== undefined) {
    const { median, p90, p99, max } = entries;
    lines.push(['entries of a table', `median ${median}, p90 ${p90}, p99 ${p99}, largest ${max}`]);
    lines.push(['handlers of all', `${handlerBytes} bytes`]);
  }
  return `${lines.map(([name, value]) => `${name!.padEnd(25)}${value}`).join('\n')}\n`;
}

import { readFileSync, statSync } from 'node:fs';
import { MemtablesError } from '../errors.js';
import { affordable, planHandlers } from '../handlers/planner.js';
import { PeImage } from '../nt/pe.js';
import { findSlack, instabilityOf } from '../slack/regions.js';
import { switchesIn } from '../switches/scan.js';
import type { SwitchSite } from '../switches/table.js';
import { hex } from '../vmi/address.js';
import { EXIT } from './exit-codes.js';
import { log, reportError } from './output.js';
import { loadRefusal } from './reasons.js';
import { toJson } from './to-json.js';

const MAX_FILE_SIZE = 2 ** 30;
const PROGRESS_MS = 1000;
/** Refused loads that are listed for a person; a program gets them all. */
const MOST_REFUSED = 20;

interface Lines {
  write(text: string): unknown;
}

interface ScanOptions {
  readonly json?: boolean | undefined;
}

/**
 * Writes the switch-table loads of PE64 files to `out`: JSON lines (a `switch` each, then a `summary`; of several files,
 * each line has its `file`), or tables for a person. A file that cannot be scanned is said on stderr, and the others are
 * scanned all the same.
 *
 * @returns the exit code: that of the first such file
 */
export function scanFiles(paths: readonly string[], options: ScanOptions, out: Lines): number {
  let code: number = EXIT.ok;
  paths.forEach((path, index) => {
    try {
      if (options.json) writeRecords(scan(path), paths.length > 1 ? { file: path } : {}, out);
      else writeTables(scan(path), index > 0, out);
    } catch (error) {
      const own = reportError(error);
      code ||= own;
    }
  });
  return code;
}

const FORMS = ['one-level', 'two-level'] as const;
type Form = (typeof FORMS)[number];

/** A load, and the fastest handler if slack were no question. */
interface ListedSwitch {
  readonly site: SwitchSite;
  readonly form: Form;
  readonly section: string;
  readonly handler: { readonly encoder: string; readonly size: number } | undefined;
  /** Why there is none. */
  readonly refused: string | undefined;
}

interface Scan {
  readonly path: string;
  readonly image: PeImage;
  readonly switches: readonly ListedSwitch[];
  /** Bytes that the image has for handlers, by section. */
  readonly slack: readonly { readonly section: string; readonly size: number }[];
  readonly seconds: number;
}

/** @throws MemtablesError `FILE_UNREADABLE`, `IMAGE_INVALID`, `GUEST_UNSUPPORTED`; it says of which file */
function scan(path: string): Scan {
  const bytes = readImageFile(path);
  try {
    const start = performance.now();
    const image = PeImage.fromFile(bytes);
    const switches: ListedSwitch[] = [];
    // Each at once, while what its function was found to do is still known.
    for (const site of switchesIn(image, progressOf(path, codeSize(image))))
      switches.push(listed(image, site));
    switches.sort((a, b) => a.site.rva - b.site.rva);
    const slack = slackOf(image);
    return { path, image, switches, slack, seconds: Math.round(performance.now() - start) / 1000 };
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

/** Logs how far a scan is, once a second. */
function progressOf(path: string, total: number): (bytes: number) => void {
  let last: number | undefined;
  return (bytes) => {
    const now = performance.now();
    last ??= now;
    if (now - last < PROGRESS_MS) return;
    last = now;
    log.info(`${path}: ${inMegabytes(bytes)} of ${inMegabytes(total)} MB of code`);
  };
}

function inMegabytes(bytes: number): string {
  return (bytes / 2 ** 20).toFixed(1);
}

function codeSections({ sections }: PeImage) {
  return sections.filter(({ executable }) => executable);
}

function codeSize(image: PeImage): number {
  return codeSections(image).reduce((sum, { virtualSize }) => sum + virtualSize, 0);
}

function slackOf(image: PeImage): Scan['slack'] {
  // Behind a section's end the loader fills its last page with zeros.
  return findSlack(0n, image.sections, (rva, length) => {
    const start = Number(rva);
    return image.read(start, Math.min(length, image.sizeOfImage - start));
  });
}

function listed(image: PeImage, site: SwitchSite): ListedSwitch {
  const section = image.sectionAt(site.rva)!;
  const known = { site, form: site.form ?? 'one-level', section: section.name } as const;
  const refused = (reason: string): ListedSwitch => ({ ...known, handler: undefined, refused: reason });
  if (!site.found) return refused(site.reason);
  const unstable = instabilityOf(section);
  if (unstable !== undefined) return refused(unstable);
  const unstableTable = instabilityOf(image.sectionAt(site.table)!);
  if (unstableTable !== undefined) return refused(`table-${unstableTable}`);
  const plans = planHandlers(site, image.imageBase, 'auto');
  const [handler] = affordable(plans, Number.POSITIVE_INFINITY);
  // The last encoder is the one that asks least of a load.
  return handler === undefined ? refused(plans.at(-1)!.refused!) : { ...known, handler, refused: undefined };
}

// For a program

function writeRecords(result: Scan, file: { readonly file?: string }, out: Lines): void {
  for (const each of result.switches) out.write(`${toJson({ ...switchRecord(each), ...file })}\n`);
  out.write(`${toJson({ ...summaryRecord(result), ...file })}\n`);
}

function switchRecord({ site, form, handler, refused }: ListedSwitch): Record<string, unknown> {
  const byteTable = site.found ? site.byteTable : undefined;
  return {
    type: 'switch',
    site: hex(site.rva),
    table: site.table === undefined ? null : hex(site.table),
    entries: site.found ? site.entries : null,
    evidence: site.found ? site.evidence : 'none',
    form,
    byteTable: byteTable && {
      site: hex(byteTable.rva),
      table: hex(byteTable.table),
      entries: byteTable.entries,
    },
    encoder: handler?.encoder ?? null,
    slackBytes: handler?.size ?? null,
    refused: refused ?? null,
  };
}

function summaryRecord({ switches, slack, seconds }: Scan): Record<string, unknown> {
  return {
    type: 'summary',
    switches: switches.length,
    twoLevel: switches.filter(({ form }) => form === 'two-level').length,
    relocatable: switches.filter(({ handler }) => handler !== undefined).length,
    refused: Object.fromEntries(countRefusals(switches)),
    slackBytes: { available: total(slack), needed: neededBytes(switches) },
    seconds,
  };
}

function countRefusals(switches: readonly ListedSwitch[]): Map<string, number> {
  const counts = new Map<string, number>();
  for (const { refused } of switches) {
    if (refused !== undefined) counts.set(refused, (counts.get(refused) ?? 0) + 1);
  }
  return counts;
}

function neededBytes(switches: readonly ListedSwitch[]): number {
  return switches.reduce((sum, { handler }) => sum + (handler?.size ?? 0), 0);
}

function total(slack: Scan['slack']): number {
  return slack.reduce((sum, { size }) => sum + size, 0);
}

// For a person

function writeTables(result: Scan, apart: boolean, out: Lines): void {
  if (apart) out.write('\n');
  out.write(header(result));
  if (result.switches.length > 0) out.write(`${sectionTable(result.switches)}\n`);
  out.write(refusedTable(result.switches));
  out.write(summaryText(result));
}

function header({ path, image }: Scan): string {
  const code = codeSections(image);
  const where = code.map(({ name }) => name).join(', ');
  const text = code.length === 0 ? 'no code' : `${Math.ceil(codeSize(image) / 1024)} KB of code in ${where}`;
  return `${path}: x86-64 image, ${text}\n\n`;
}

/** A line for each form in each section. */
function sectionTable(switches: readonly ListedSwitch[]): string {
  const sections = new Set(switches.map(({ section }) => section));
  const groups = [...sections].flatMap((section) =>
    FORMS.map((form) => switches.filter((each) => each.section === section && each.form === form)),
  );
  const present = groups.filter((group) => group.length > 0);
  const rows = present.map((group) => {
    const entries = group.flatMap(({ site }) => (site.found ? [site.entries] : []));
    const known = (evidence: string) =>
      group.filter(({ site }) => site.found && site.evidence === evidence).length;
    return [
      ...[group[0]!.section, group[0]!.form],
      ...[group.length, known('guard'), known('neighbour'), Math.max(0, ...entries)],
      ...[group.filter(({ handler }) => handler !== undefined).length, neededBytes(group)],
    ];
  });
  const columns = ['section', 'form', 'switches', 'end by guard', 'by neighbour', 'largest'];
  return table([...columns, 'relocatable', 'bytes'], rows, 2);
}

function refusedTable(switches: readonly ListedSwitch[]): string {
  const refused = switches.filter((each) => each.refused !== undefined);
  if (refused.length === 0) return '';
  const rows = refused.slice(0, MOST_REFUSED).map(({ site, refused: reason, section }) => {
    const address = site.table === undefined ? '' : hex(site.table);
    return [hex(site.rva), section, address, loadRefusal(reason!) ?? reason!];
  });
  const more = refused.length - rows.length;
  return `${table(['refused', 'section', 'table', 'because'], rows, 4)}${more > 0 ? `  and ${more} more\n` : ''}\n`;
}

/** The first `left` columns are text, the others numbers. */
function table(columns: readonly string[], rows: readonly (string | number)[][], left: number): string {
  const cells = rows.map((row) => row.map(String));
  const widths = columns.map((column, index) =>
    cells.reduce((width, row) => Math.max(width, row[index]!.length), column.length),
  );
  const rule = widths.map((width) => '-'.repeat(width));
  const line = (row: readonly string[]) =>
    row.map((cell, index) => (index < left ? cell.padEnd(widths[index]!) : cell.padStart(widths[index]!)));
  return [columns, rule, ...cells].map((row) => `  ${line(row).join('  ').trimEnd()}\n`).join('');
}

function summaryText({ switches, slack, seconds }: Scan): string {
  const twoLevel = switches.filter(({ form }) => form === 'two-level').length;
  const sizes = switches.flatMap(({ handler }) => (handler === undefined ? [] : [handler.size]));
  const lines = [
    ['switches', `${switches.length} (${switches.length - twoLevel} one-level, ${twoLevel} two-level)`],
    ['  relocatable', `${sizes.length}, with handlers of ${neededBytes(switches)} bytes`],
    ...[...countRefusals(switches)].map(([reason, count]) => [
      '  refused',
      `${count}: ${loadRefusal(reason) ?? reason}`,
    ]),
    [
      'slack for handlers',
      `${total(slack)} bytes${sizes.length === 0 ? '' : `, ${sufficiency(sizes, slack)}`}`,
    ],
    ['time', `${seconds.toFixed(1)} s`],
  ];
  return `${lines.map(([name, value]) => `${name!.padEnd(20)}${value}`).join('\n')}\n`;
}

function sufficiency(sizes: readonly number[], slack: Scan['slack']): string {
  let left = total(slack);
  let fitting = 0;
  for (const size of sizes.toSorted((a, b) => a - b)) {
    left -= size;
    if (left < 0) return `enough for ${fitting} of them at once, the smallest first`;
    fitting++;
  }
  return 'enough for all of them';
}

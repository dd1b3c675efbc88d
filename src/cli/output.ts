import { levels, pino } from 'pino';
import pretty from 'pino-pretty';
import { MemtablesError } from '../errors.js';
import { hex } from '../vmi/address.js';
import { EXIT, exitCodeOf } from './exit-codes.js';
import { hookRefusal } from './reasons.js';
import { toJson } from './to-json.js';

const broken = new AbortController();
/** Aborted, with the error, once stdout cannot be written any more: its reader has closed it, or a disk is full. */
export const stdoutBroken: AbortSignal = broken.signal;
process.stdout.on('error', (error) => broken.abort(error));
// Nobody is left to be told.
process.stderr.on('error', () => {});

/** @throws MemtablesError `FILE_UNREADABLE` when results were lost, unless their reader did not want more */
export function assertResultsWritten(): void {
  const cause = stdoutBroken.reason as NodeJS.ErrnoException | undefined;
  if (cause === undefined || cause.code === 'EPIPE') return;
  throw new MemtablesError('FILE_UNREADABLE', `the results could not be written: ${cause.message}`, {
    remedy: 'Look at what stdout leads to: a full disk, perhaps.',
    cause,
  });
}

/** Results, on stdout: lines for a person, or JSON lines for a program. */
export class Output {
  constructor(readonly json: boolean) {}

  /** A result in both forms: `record` as a JSON line, or `text` for a person, where that has something to say. */
  result(record: Readonly<Record<string, unknown>>, text: string | undefined): void {
    const line = this.json ? toJson(record) : text;
    if (line !== undefined && !stdoutBroken.aborted) process.stdout.write(`${line}\n`);
  }
}

const LEVELS = [...Object.values(levels.labels), 'silent'];
const level = process.env.MEMTABLES_LOG || 'info';

/** Logs, on stderr. */
export const log = pino(
  { level: LEVELS.includes(level) ? level : 'info' },
  pretty({ destination: 2, sync: true, ignore: 'pid,hostname', translateTime: 'HH:MM:ss.l' }),
);

if (!LEVELS.includes(level)) log.warn(`MEMTABLES_LOG is '${level}', which is none of ${LEVELS.join(', ')}`);

/** Says on stderr what went wrong and what to do about it; returns the exit code. */
export function reportError(error: unknown): number {
  if (error instanceof MemtablesError) {
    process.stderr.write(`memtables: ${error.message} [${error.code}]\n`);
    for (const [name, value] of Object.entries(error.context)) {
      // The message lists them.
      if (name === 'candidates') continue;
      const lines = isTable(value) ? tableLines(value) : [`${textOf(value)}${meaningOf(error, name)}`];
      process.stderr.write(`  ${name}: ${lines.join('\n    ')}\n`);
    }
    for (let { cause } = error as Error; cause instanceof Error; { cause } = cause) {
      const code = cause instanceof MemtablesError ? ` [${cause.code}]` : '';
      process.stderr.write(`  cause: ${cause.message}${code}\n`);
    }
    process.stderr.write(`  what to do: ${error.remedy}\n`);
    return exitCodeOf(error.code);
  }
  process.stderr.write(
    `memtables: internal error: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`,
  );
  return EXIT.internal;
}

function textOf(value: unknown): string {
  if (typeof value === 'string') return value;
  if (Array.isArray(value) && value.every((item) => typeof item === 'string')) return value.join(', ');
  return toJson(value);
}

/** Of a table, such as that of the changes in a guest, no more is printed; a journal has the rest. */
const MOST_ROWS = 20;
const MOST_CHARACTERS = 64;

type Row = Readonly<Record<string, unknown>>;

function isTable(value: unknown): value is readonly Row[] {
  return Array.isArray(value) && value.length > 0 && value.every((item) => item?.constructor === Object);
}

/** The number of rows, and a line for each. */
function tableLines(rows: readonly Row[]): string[] {
  const lines = rows.slice(0, MOST_ROWS).map((row) =>
    Object.entries(row)
      .map(([name, value]) => `${name} ${shortened(typeof value === 'bigint' ? hex(value) : textOf(value))}`)
      .join(', '),
  );
  const more = rows.length - lines.length;
  return [`${rows.length}`, ...lines, ...(more > 0 ? [`and ${more} more`] : [])];
}

function shortened(text: string): string {
  return text.length > MOST_CHARACTERS ? `${text.slice(0, MOST_CHARACTERS)}…` : text;
}

/** Why a hook was refused, in words. */
function meaningOf({ code, context }: MemtablesError, name: string): string {
  if (code !== 'HOOK_REFUSED' || name !== 'reason') return '';
  const words = hookRefusal(context.reason);
  return words === undefined ? '' : `, which means: ${words}`;
}

import {
  accessSync,
  closeSync,
  constants,
  existsSync,
  ftruncateSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  writeSync,
} from 'node:fs';
import { dirname } from 'node:path';
import { MemtablesError } from '../errors.js';
import { type Gpa, hex } from '../vmi/address.js';

/** One change of contiguous guest-physical bytes, inside one page. */
export interface JournalledWrite {
  readonly gpa: Gpa;
  readonly before: Uint8Array;
  readonly after: Uint8Array;
  /** What the bytes belong to, for a person who reads the journal. */
  readonly owner: string;
}

/** A change that a journal says was never undone. */
export interface LeftChange {
  readonly gpa: Gpa;
  readonly before: Uint8Array;
  readonly owner: string;
}

/** What ties a journal to one boot of one guest. */
export interface JournalIdentity {
  readonly guest: string;
  readonly kernelBase: bigint;
  /** Which build of the kernel it is. */
  readonly pdb: string;
}

/**
 * The record of what has been changed in the guest and not been undone: a file of JSON lines, each written
 * before its change is made. After a crash it says which bytes to put back; after a clean unload it is gone.
 */
export class Journal {
  readonly #path: string;
  readonly #fd: number;
  /** Bytes of whole lines. */
  #size = 0;
  #nextId = 1;
  readonly #open = new Set<number>();

  private constructor(path: string, fd: number) {
    this.#path = path;
    this.#fd = fd;
  }

  /**
   * Checks, before anything is attached, that a journal of `guest` can be created at `path` as far as the file and
   * its directory tell.
   *
   * @throws MemtablesError `JOURNAL_FAILED`
   */
  static check(path: string, guest: string): void {
    if (existsSync(path)) readJournalOf(guest, path);
    else guarded(path, () => accessSync(dirname(path), constants.W_OK));
  }

  /**
   * Creates the file at `path`.
   *
   * A journal that is there already was left by a run that did not undo its changes. It is replaced when the guest
   * has been restarted since, or when each of them has been undone. A file that is something else is left alone.
   *
   * @param isUndone whether the bytes of before a change are in the guest now
   * @throws MemtablesError `JOURNAL_FAILED` when an earlier run's changes are still in the guest, when the file is no
   *   journal or that of another guest, or when it cannot be written
   */
  static create(path: string, identity: JournalIdentity, isUndone: (change: LeftChange) => boolean): Journal {
    if (existsSync(path)) {
      const earlier = readJournalOf(identity.guest, path);
      const left = isOfThisBoot(earlier, identity) ? earlier.left.filter((change) => !isUndone(change)) : [];
      if (left.length > 0) throw stillInGuest(path, left);
      guarded(path, () => rmSync(path));
    }
    const journal = guarded(path, () => new Journal(path, openSync(path, 'wx', 0o600)));
    try {
      journal.#write({
        type: 'journal',
        version: 1,
        guest: identity.guest,
        kernelBase: hex(identity.kernelBase),
        pdb: identity.pdb,
      });
    } catch (error) {
      journal.#abandon();
      throw error;
    }
    return journal;
  }

  /** Records a change about to be made; returns its number. */
  record(change: JournalledWrite): number {
    const id = this.#nextId++;
    this.#write({
      type: 'write',
      id,
      owner: change.owner,
      gpa: hex(change.gpa),
      before: Buffer.from(change.before).toString('hex'),
      after: Buffer.from(change.after).toString('hex'),
    });
    this.#open.add(id);
    return id;
  }

  /**
   * Records that a change has been undone. Where that cannot be written, on a full disk, undoing the others goes on
   * all the same: the file then lists a change too much, which `create` compares with the guest.
   */
  undone(id: number): void {
    this.#open.delete(id);
    try {
      this.#write({ type: 'undone', id });
    } catch (error) {
      if (!(error instanceof MemtablesError)) throw error;
    }
  }

  /** How many changes are still in the guest. */
  get outstanding(): number {
    return this.#open.size;
  }

  /**
   * Ends the journal; the file stays where changes are still in the guest.
   *
   * @throws MemtablesError `JOURNAL_FAILED`
   */
  close(): void {
    guarded(this.#path, () => {
      closeSync(this.#fd);
      if (this.#open.size === 0) rmSync(this.#path, { force: true });
    });
  }

  #abandon(): void {
    try {
      this.close();
    } catch {
      // A journal without a line is replaced by the next run.
    }
  }

  /**
   * Appends the whole line, or nothing of it. No fsync: the file has to outlive this process; a crash of the machine
   * takes the guest along.
   */
  #write(line: Record<string, unknown>): void {
    const bytes = Buffer.from(`${JSON.stringify(line)}\n`);
    guarded(this.#path, () => {
      try {
        // A disk that is nearly full takes the beginning, and says so at the next attempt only.
        for (let done = 0; done < bytes.length; ) {
          done += writeSync(this.#fd, bytes, done, bytes.length - done, this.#size + done);
        }
      } catch (error) {
        ftruncateSync(this.#fd, this.#size);
        throw error;
      }
    });
    this.#size += bytes.length;
  }
}

/**
 * The changes that the journal at `path` says were not undone; none where there is no file. May be called while another
 * thread writes it.
 *
 * @throws MemtablesError `JOURNAL_FAILED`
 */
export function changesLeft(path: string): readonly LeftChange[] {
  return existsSync(path) ? readJournal(path).left : [];
}

/** How a journal begins. */
const HEADER_START = '{"type":"journal","version":1,';
const HEX_ADDRESS = /^0x[0-9a-f]{1,16}$/;
const HEX_BYTES = /^([0-9a-f]{2})+$/;

interface EarlierJournal {
  /** `undefined` where the run was killed before it had written that. */
  readonly identity: JournalIdentity | undefined;
  /** The changes that were not undone. */
  readonly left: readonly LeftChange[];
}

/**
 * Reads a journal. Its last line may be cut short: what it announced was not done.
 *
 * @throws MemtablesError `JOURNAL_FAILED` when the file is no journal; it is left alone then
 */
function readJournal(path: string): EarlierJournal {
  // A device may have no end.
  if (!guarded(path, () => statSync(path)).isFile()) throw notAJournal(path, 1);
  const text = guarded(path, () => readFileSync(path, 'utf8'));
  if (!text.startsWith(HEADER_START.slice(0, text.length))) throw notAJournal(path, 1);
  let identity: JournalIdentity | undefined;
  const left = new Map<number, LeftChange>();
  const lines = text.split('\n').slice(0, -1);
  lines.forEach((line, index) => {
    const entry = parseLine(line);
    if (entry?.type === 'write') left.set(entry.id, entry);
    else if (entry?.type === 'undone') left.delete(entry.id);
    else if (entry === undefined || index > 0) throw notAJournal(path, index + 1);
    else identity = entry;
  });
  return { identity, left: [...left.values()] };
}

/** @throws MemtablesError `JOURNAL_FAILED` when the file is no journal, or that of another guest */
function readJournalOf(guest: string, path: string): EarlierJournal {
  const earlier = readJournal(path);
  if (earlier.identity === undefined || earlier.identity.guest === guest) return earlier;
  throw new MemtablesError(
    'JOURNAL_FAILED',
    `${path} is the journal of the guest ${earlier.identity.guest}`,
    {
      remedy: 'Choose another place for the journal (--journal PATH); that guest may be in use.',
      context: { path, guest },
    },
  );
}

/** A restart moves the kernel, though now and then to where it was: what is in memory then decides. */
function isOfThisBoot({ identity }: EarlierJournal, { kernelBase, pdb }: JournalIdentity): boolean {
  return identity === undefined || (identity.kernelBase === kernelBase && identity.pdb === pdb);
}

type Entry =
  | ({ readonly type: 'journal' } & JournalIdentity)
  | ({ readonly type: 'write'; readonly id: number } & LeftChange)
  | { readonly type: 'undone'; readonly id: number };

function parseLine(line: string): Entry | undefined {
  let entry: Record<string, unknown>;
  try {
    entry = { ...JSON.parse(line) };
  } catch {
    return undefined;
  }
  const { type, guest, kernelBase, pdb, id, gpa, before, owner } = entry;
  if (type === 'journal') {
    if (typeof guest !== 'string' || !isHex(kernelBase, HEX_ADDRESS) || typeof pdb !== 'string')
      return undefined;
    return { type, guest, kernelBase: BigInt(kernelBase), pdb };
  }
  if (typeof id !== 'number') return undefined;
  if (type === 'undone') return { type, id };
  if (type !== 'write' || typeof owner !== 'string') return undefined;
  if (!isHex(gpa, HEX_ADDRESS) || !isHex(before, HEX_BYTES)) return undefined;
  return { type, id, gpa: BigInt(gpa), before: Buffer.from(before, 'hex'), owner };
}

function isHex(value: unknown, pattern: RegExp): value is string {
  return typeof value === 'string' && pattern.test(value);
}

function stillInGuest(path: string, left: readonly LeftChange[]): MemtablesError {
  return new MemtablesError('JOURNAL_FAILED', `an earlier run's changes are still in the guest: ${path}`, {
    remedy:
      'Restart the guest, or put the bytes back that the journal lists; then attach again. If it has been ' +
      'restarted since, remove the journal.',
    context: { path, changes: left.length, firstGpa: left[0]!.gpa },
  });
}

function notAJournal(path: string, line: number): MemtablesError {
  return new MemtablesError('JOURNAL_FAILED', `${path} is not a journal of memtables`, {
    remedy: 'Move the file away, or choose another place for the journal (--journal PATH).',
    context: { path, line },
  });
}

function guarded<T>(path: string, action: () => T): T {
  try {
    return action();
  } catch (cause) {
    throw new MemtablesError('JOURNAL_FAILED', `the journal at ${path} could not be read or written`, {
      remedy:
        'Choose another place for the journal (--journal PATH), one that can be written and has free space.',
      context: { path },
      cause,
    });
  }
}

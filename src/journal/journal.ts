import { closeSync, existsSync, openSync, rmSync, writeSync } from 'node:fs';
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

/** What ties a journal to one boot of one guest. */
export interface JournalIdentity {
  readonly guest: string;
  readonly kernelBase: bigint;
  readonly pdb: string;
}

/**
 * The record of what has been changed in the guest and not been undone: a file of JSON lines, each written
 * before its change is made. After a crash it says which bytes to put back; after a clean unload it is gone.
 */
export class Journal {
  readonly #path: string;
  readonly #fd: number;
  #nextId = 1;
  readonly #open = new Set<number>();

  private constructor(path: string, fd: number) {
    this.#path = path;
    this.#fd = fd;
  }

  /**
   * Creates the file at `path`.
   *
   * @throws MemtablesError `JOURNAL_FAILED` when one is already there: an earlier run did not undo its changes.
   */
  static create(path: string, identity: JournalIdentity): Journal {
    if (existsSync(path)) {
      throw new MemtablesError('JOURNAL_FAILED', `a journal of an earlier run is left at ${path}`, {
        remedy:
          'That run ended without undoing its changes: restart the guest (or undo them by hand from the journal), then delete the file.',
        context: { path },
      });
    }
    const journal = guarded(path, () => new Journal(path, openSync(path, 'wx', 0o600)));
    journal.#write({
      type: 'journal',
      version: 1,
      guest: identity.guest,
      kernelBase: hex(identity.kernelBase),
      pdb: identity.pdb,
    });
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

  /** Records that a change has been undone. */
  undone(id: number): void {
    this.#write({ type: 'undone', id });
    this.#open.delete(id);
  }

  /** How many changes are still in the guest. */
  get outstanding(): number {
    return this.#open.size;
  }

  /** Ends the journal; the file stays where changes are still in the guest. */
  close(): void {
    closeSync(this.#fd);
    if (this.#open.size === 0) rmSync(this.#path, { force: true });
  }

  #write(line: Record<string, unknown>): void {
    // No fsync: the file has to outlive this process; a crash of the machine takes the guest along.
    guarded(this.#path, () => writeSync(this.#fd, `${JSON.stringify(line)}\n`));
  }
}

function guarded<T>(path: string, action: () => T): T {
  try {
    return action();
  } catch (cause) {
    throw new MemtablesError('JOURNAL_FAILED', `the journal at ${path} could not be written`, {
      remedy: 'Choose a place for the journal that can be written, with free space (--journal PATH).',
      context: { path },
      cause,
    });
  }
}

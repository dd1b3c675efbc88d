import { MemtablesError } from '../errors.js';
import { firstIndex } from '../first-index.js';
import { DIRECTORY, imageInvalid, type PeImage, viewOf } from './pe.js';

/** A RUNTIME_FUNCTION: a function, or a fragment of one, with addresses relative to the image base. */
export interface RuntimeFunction {
  readonly begin: number;
  /** Exclusive. */
  readonly end: number;
  /** Where its UNWIND_INFO lies. */
  readonly unwind: number;
}

/** What an UNWIND_INFO says that matters to control flow. */
export interface UnwindInfo {
  readonly chained: RuntimeFunction | undefined;
  /** The language-specific handler and its data, where there is one. */
  readonly handler: { readonly rva: number; readonly dataRva: number } | undefined;
}

const ENTRY_SIZE = 12;
/** ntoskrnl.exe has about 40,000, the largest applications about 500,000. */
const MAX_ENTRIES = 1 << 20;
/** Real chains have one or two links. */
const MAX_CHAIN = 32;
const UNWIND_VERSION_MASK = 7;
const UNWIND_FLAGS_SHIFT = 3;
const UNWIND_HANDLERS = 1 | 2;
const UNWIND_CHAINED = 4;
/** Set in the unwind address when it names another RUNTIME_FUNCTION instead. */
const INDIRECT = 1;

/** The `.pdata` of an image: which function an instruction belongs to. */
export class FunctionTable {
  private fragments: Map<number, RuntimeFunction[]> | undefined;

  private constructor(
    private readonly image: PeImage,
    /** In ascending order, never overlapping. */
    readonly entries: readonly RuntimeFunction[],
  ) {}

  /** @throws MemtablesError `IMAGE_INVALID`; an image without `.pdata` has an empty table. */
  static read(image: PeImage): FunctionTable {
    const directory = image.directory(DIRECTORY.exception);
    if (directory === undefined) return new FunctionTable(image, []);
    const count = Math.floor(directory.size / ENTRY_SIZE);
    if (count > MAX_ENTRIES) throw imageInvalid(`.pdata is said to have ${count} entries`, { count });
    const view = viewOf(image.read(directory.rva, count * ENTRY_SIZE));
    const entries: RuntimeFunction[] = [];
    let previousEnd = 0;
    for (let at = 0; at < view.byteLength; at += ENTRY_SIZE) {
      const entry = parseEntry(view, at);
      if (entry.begin === 0 && entry.end === 0) continue; // padding of incremental linking
      checkEntry(image, entry);
      if (entry.begin < previousEnd) {
        throw imageInvalid('.pdata is not sorted or has overlapping entries', { ...entry, previousEnd });
      }
      previousEnd = entry.end;
      entries.push(entry);
    }
    return new FunctionTable(image, entries);
  }

  /** The entry whose range holds `rva`, or `undefined` between functions. */
  entryAt(rva: number): RuntimeFunction | undefined {
    const entry = this.entries[this.upperBound(rva) - 1];
    return entry !== undefined && rva < entry.end ? entry : undefined;
  }

  /** The range around `rva` that no entry covers, inside `[low, high)`; empty when an entry covers `rva`. */
  gapAround(rva: number, low: number, high: number): { begin: number; end: number } {
    const next = this.upperBound(rva);
    const begin = Math.max(low, this.entries[next - 1]?.end ?? low);
    const end = Math.min(high, this.entries[next]?.begin ?? high);
    return begin <= rva && rva < end ? { begin, end } : { begin: rva, end: rva };
  }

  /** @throws MemtablesError `IMAGE_INVALID` */
  unwindInfo(entry: RuntimeFunction): UnwindInfo {
    if (entry.unwind & INDIRECT) {
      const target = parseEntry(viewOf(this.image.read(entry.unwind & ~INDIRECT, ENTRY_SIZE)), 0);
      checkEntry(this.image, target);
      return { chained: target, handler: undefined };
    }
    const header = this.image.read(entry.unwind, 4);
    const version = header[0]! & UNWIND_VERSION_MASK;
    const flags = header[0]! >> UNWIND_FLAGS_SHIFT;
    if (version !== 1 && version !== 2) {
      throw imageInvalid(`unwind data of version ${version}`, { ...entry, version });
    }
    // The codes are 2 bytes each, padded to an even number of them.
    const tail = entry.unwind + 4 + ((header[2]! + 1) & ~1) * 2;
    if (flags & UNWIND_CHAINED) {
      const chained = parseEntry(viewOf(this.image.read(tail, ENTRY_SIZE)), 0);
      checkEntry(this.image, chained);
      return { chained, handler: undefined };
    }
    if (flags & UNWIND_HANDLERS) {
      return { chained: undefined, handler: { rva: this.image.readU32(tail), dataRva: tail + 4 } };
    }
    return { chained: undefined, handler: undefined };
  }

  /**
   * The function that a fragment is a part of: the end of its chain.
   * @throws MemtablesError `IMAGE_INVALID` for a chain that does not end
   */
  primaryOf(entry: RuntimeFunction): RuntimeFunction {
    let current = entry;
    for (let link = 0; link < MAX_CHAIN; link++) {
      const { chained } = this.unwindInfo(current);
      if (chained === undefined) return current;
      current = chained;
    }
    throw imageInvalid('a chain of unwind data does not end', { ...entry });
  }

  /**
   * All entries of one function, in ascending order. An entry whose unwind data cannot be read is a
   * function of its own.
   */
  fragmentsOf(entry: RuntimeFunction): readonly RuntimeFunction[] {
    this.fragments ??= this.groupFragments();
    return this.fragments.get(this.startOf(entry)) ?? [entry];
  }

  /** Where the function begins that `entry` is a fragment of. */
  startOf(entry: RuntimeFunction): number {
    try {
      return this.primaryOf(entry).begin;
    } catch (error) {
      if (error instanceof MemtablesError) return entry.begin;
      throw error;
    }
  }

  private groupFragments(): Map<number, RuntimeFunction[]> {
    const groups = new Map<number, RuntimeFunction[]>();
    for (const entry of this.entries) {
      const key = this.startOf(entry);
      const group = groups.get(key);
      if (group === undefined) groups.set(key, [entry]);
      else group.push(entry);
    }
    return groups;
  }

  /** Index of the first entry that begins above `rva`. */
  private upperBound(rva: number): number {
    return firstIndex(this.entries, ({ begin }) => begin > rva);
  }
}

function parseEntry(view: DataView, at: number): RuntimeFunction {
  return {
    begin: view.getUint32(at, true),
    end: view.getUint32(at + 4, true),
    unwind: view.getUint32(at + 8, true),
  };
}

function checkEntry(image: PeImage, entry: RuntimeFunction): void {
  if (entry.begin >= entry.end || entry.end > image.sizeOfImage || entry.unwind >= image.sizeOfImage) {
    throw imageInvalid('an entry of .pdata leaves the image', { ...entry, sizeOfImage: image.sizeOfImage });
  }
}

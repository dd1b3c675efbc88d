import { readFileSync, statSync } from 'node:fs';
import { gunzipSync } from 'node:zlib';
import { MemtablesError } from '../errors.js';
import type { PdbReference } from './pe.js';

/** The largest profile of a real kernel is about 20 MB of JSON. */
const MAX_PROFILE_BYTES = 128 * 1024 * 1024;
/** No structure of the kernel is larger; KPRCB, the largest, has about 48 KB. */
const MAX_FIELD_OFFSET = 0x10_0000;
const MAX_U32 = 0xffff_ffff;
/** What a name has to share with a misspelt one to be suggested for it. */
const MIN_COMMON_START = 4;
const MAX_SUGGESTIONS = 3;

const GZIP_MAGIC = Buffer.from([0x1f, 0x8b]);
const XZ_MAGIC = Buffer.from([0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00]);

type JsonObject = Record<string, unknown>;

/** Symbols and structure offsets of one kernel build, in the format of Volatility 3 (ISF). */
export class Profile {
  private sortedRvas: number[] | undefined;

  constructor(
    /** Where it came from, for messages. */
    readonly source: string,
    /** Which kernel build it describes. */
    readonly pdb: PdbReference,
    private readonly symbols: JsonObject,
    private readonly types: JsonObject,
  ) {}

  hasSymbol(name: string): boolean {
    return member(this.symbols, name) !== undefined;
  }

  /**
   * The RVA of a symbol in the kernel image.
   *
   * @throws MemtablesError `SYMBOL_NOT_FOUND`, `PROFILE_INVALID`
   */
  symbol(name: string): number {
    if (!this.hasSymbol(name)) {
      const similar = this.similarTo(name);
      throw new MemtablesError('SYMBOL_NOT_FOUND', `the profile has no symbol ${name}`, {
        remedy:
          similar.length > 0
            ? `Check the spelling; there is ${similar.join(', ')}.`
            : 'Check the spelling, or make the profile from the full PDB of this kernel.',
        context: { symbol: name, profile: this.source },
      });
    }
    const rva = member(member(this.symbols, name), 'address');
    if (!isUnsigned(rva, MAX_U32)) throw invalid(this.source, `symbol ${name} has no RVA`);
    return rva;
  }

  /** The symbols that begin most like `name`, letters' case aside. */
  private similarTo(name: string): string[] {
    const wanted = name.toLowerCase();
    const least = Math.min(wanted.length, Math.max(MIN_COMMON_START, wanted.length - 3));
    return Object.keys(this.symbols)
      .map((symbol) => ({ symbol, common: commonStart(symbol.toLowerCase(), wanted) }))
      .filter(({ common }) => common >= least)
      .sort((a, b) => b.common - a.common || a.symbol.length - b.symbol.length)
      .slice(0, MAX_SUGGESTIONS)
      .map(({ symbol }) => symbol);
  }

  /** The RVA of the next symbol behind `rva`; `undefined` where there is none. */
  symbolAfter(rva: number): number | undefined {
    this.sortedRvas ??= Object.values(this.symbols)
      .map((symbol) => member(symbol, 'address'))
      .filter((address): address is number => isUnsigned(address, MAX_U32))
      .sort((a, b) => a - b);
    return this.sortedRvas.find((address) => address > rva);
  }

  hasField(type: string, field: string): boolean {
    return member(member(member(this.types, type), 'fields'), field) !== undefined;
  }

  /**
   * The offset of a field in a structure, in bytes: `offset('_KTHREAD', 'KernelStack')`.
   *
   * @throws MemtablesError `SYMBOL_NOT_FOUND`, `PROFILE_INVALID`
   */
  offset(type: string, field: string): number {
    if (!this.hasField(type, field)) {
      throw new MemtablesError('SYMBOL_NOT_FOUND', `the profile has no field ${type}.${field}`, {
        remedy: 'Make the profile from the full PDB of this kernel; it must hold its structures.',
        context: { type, field, profile: this.source },
      });
    }
    const offset = member(member(member(member(this.types, type), 'fields'), field), 'offset');
    if (!isUnsigned(offset, MAX_FIELD_OFFSET)) throw invalid(this.source, `${type}.${field} has no offset`);
    return offset;
  }
}

/**
 * Reads a profile from a `.json` or `.json.gz` file.
 *
 * @throws MemtablesError `FILE_UNREADABLE`, or `PROFILE_INVALID` when it is too large, not ISF, not of a
 * Windows kernel, or compressed with xz.
 */
export function loadProfile(path: string): Profile {
  return parseProfile(unpack(readBounded(path), path), path);
}

/** `source` names the profile in messages. @throws MemtablesError `PROFILE_INVALID` */
export function parseProfile(text: string, source: string): Profile {
  let root: unknown;
  try {
    root = JSON.parse(text);
  } catch (cause) {
    throw invalid(source, 'it is not JSON', { cause });
  }
  const symbols = member(root, 'symbols');
  const types = member(root, 'user_types');
  if (!isObject(symbols) || !isObject(types)) throw invalid(source, 'it has no symbols or no user_types');
  return new Profile(source, parsePdb(root, source), symbols, types);
}

function parsePdb(root: unknown, source: string): PdbReference {
  const pdb = member(member(member(root, 'metadata'), 'windows'), 'pdb');
  const [guid, age, name] = ['GUID', 'age', 'database'].map((key) => member(pdb, key));
  const digits = typeof guid === 'string' ? guid.replace(/[{}-]/g, '').toUpperCase() : '';
  if (!/^[0-9A-F]{32}$/.test(digits) || !isUnsigned(age, MAX_U32) || typeof name !== 'string') {
    throw invalid(source, 'metadata.windows.pdb does not name a PDB (GUID, age, database)');
  }
  return { name, guid: digits, age };
}

function readBounded(path: string): Buffer {
  try {
    const { size } = statSync(path);
    if (size > MAX_PROFILE_BYTES) throw invalid(path, `it has ${size} bytes`);
    return readFileSync(path);
  } catch (cause) {
    if (cause instanceof MemtablesError) throw cause;
    throw new MemtablesError('FILE_UNREADABLE', `the profile ${path} cannot be read`, {
      remedy: 'Check the path and its permissions.',
      context: { path },
      cause,
    });
  }
}

function unpack(bytes: Buffer, path: string): string {
  if (bytes.subarray(0, XZ_MAGIC.length).equals(XZ_MAGIC)) {
    throw new MemtablesError('PROFILE_INVALID', `the profile ${path} is compressed with xz`, {
      remedy: `Unpack it first: xz --decompress --keep ${path}`,
      context: { path },
    });
  }
  if (!bytes.subarray(0, GZIP_MAGIC.length).equals(GZIP_MAGIC)) return bytes.toString('utf8');
  try {
    return gunzipSync(bytes, { maxOutputLength: MAX_PROFILE_BYTES }).toString('utf8');
  } catch (cause) {
    throw invalid(path, 'it cannot be decompressed', { cause });
  }
}

function commonStart(a: string, b: string): number {
  let length = 0;
  while (length < a.length && a[length] === b[length]) length++;
  return length;
}

function invalid(source: string, reason: string, { cause }: { cause?: unknown } = {}): MemtablesError {
  return new MemtablesError('PROFILE_INVALID', `the profile ${source} cannot be used: ${reason}`, {
    remedy: 'Make it with Volatility 3 (pdbconv.py) from the PDB of the kernel that runs in the guest.',
    context: { profile: source },
    cause,
  });
}

function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** An own property, so that a name like `constructor` finds nothing. */
function member(value: unknown, key: string): unknown {
  return isObject(value) && Object.hasOwn(value, key) ? value[key] : undefined;
}

function isUnsigned(value: unknown, max: number): value is number {
  return typeof value === 'number' && Number.isInteger(value) && value >= 0 && value <= max;
}

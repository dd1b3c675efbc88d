// Images whose code tests write as assembly text.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage } from '../../src/nt/pe.js';
import { SwitchRecogniser, type SwitchSite } from '../../src/switches/table.js';
import {
  buildPe,
  buildUnwindData,
  FLAGS,
  type FunctionEntry,
  type SectionContent,
} from '../nt/pe-builder.js';

export const CODE_RVA = 0x1000;
const PAGE = 0x1000;

/** A function, or a fragment of one, between two labels. */
export interface Fragment {
  readonly from: string;
  readonly to: string;
  /** The `from` of the fragment that the unwind data continues. */
  readonly chainedTo?: string;
  /** Labels of `__except` blocks. */
  readonly handlers?: readonly string[];
}

export interface ListingOptions {
  /** Default: one function from label `f` to label `end`. */
  readonly functions?: readonly Fragment[];
  /** Sections by the label they begin at (which has to be aligned to a page); default: all is `.text`. */
  readonly sections?: readonly { readonly name: string; readonly at: string; readonly flags: number }[];
}

export interface Listing {
  readonly file: Buffer;
  readonly image: PeImage;
  readonly functions: FunctionTable;
  /** Code and tables, from `CODE_RVA` on. */
  readonly code: Buffer;
  rva(label: string): number;
}

/**
 * An image with `source` (GNU as, Intel syntax) at `CODE_RVA`. The symbol `image` is the image base; an address
 * relative to it is written as `label-image`.
 */
export function assemble(source: string, options: ListingOptions = {}): Listing {
  const { code, symbols } = runAssembler(`.intel_syntax noprefix\n.set image, .-${CODE_RVA}\n${source}\n`);
  const rva = (label: string): number => {
    const offset = symbols.get(label);
    if (offset === undefined) throw new Error(`there is no label ${label}`);
    return CODE_RVA + offset;
  };
  const sections = contentOf(code, options.sections ?? [], rva);
  const fragments = options.functions ?? [{ from: 'f', to: 'end' }];
  const unwindRva = CODE_RVA + Math.ceil(code.length / PAGE) * PAGE;
  const unwind = buildUnwindData(entriesOf(fragments, rva), unwindRva);
  const file = buildPe({
    sections: [
      ...sections,
      { name: '.pdata', rva: unwindRva, bytes: unwind.bytes, flags: FLAGS.data },
    ].filter(({ bytes }) => bytes.length > 0),
    directories: fragments.length === 0 ? {} : { 3: unwind.directory },
    sizeOfImage: unwindRva + PAGE * 16,
  });
  const image = PeImage.fromFile(file);
  return { file, image, functions: FunctionTable.read(image), code, rva };
}

/** What the recogniser says of the load at label `load`. */
export function prove(source: string, options: ListingOptions & { readonly load?: string } = {}): SwitchSite {
  const { image, functions, rva } = assemble(source, options);
  return new SwitchRecogniser(image, functions).prove(rva(options.load ?? 'load'));
}

function contentOf(
  code: Buffer,
  wanted: NonNullable<ListingOptions['sections']>,
  rva: (label: string) => number,
): SectionContent[] {
  const starts = wanted.map(({ at }) => rva(at) - CODE_RVA);
  const text = { name: '.text', rva: CODE_RVA, bytes: code.subarray(0, starts[0]), flags: FLAGS.code };
  return [
    text,
    ...wanted.map(({ name, flags }, index) => ({
      name,
      rva: CODE_RVA + starts[index]!,
      bytes: code.subarray(starts[index], starts[index + 1]),
      flags,
    })),
  ];
}

function entriesOf(fragments: readonly Fragment[], rva: (label: string) => number): FunctionEntry[] {
  const known = new Map<string, FunctionEntry>();
  for (const { from, to, chainedTo, handlers } of fragments) {
    known.set(from, {
      begin: rva(from),
      end: rva(to),
      ...(chainedTo !== undefined && { chainedTo: known.get(chainedTo)! }),
      ...(handlers !== undefined && { handlers: handlers.map(rva) }),
    });
  }
  return [...known.values()];
}

/** Assembles to an ELF object and takes `.text` and its symbols out. */
function runAssembler(source: string): { code: Buffer; symbols: Map<string, number> } {
  const directory = mkdtempSync(join(tmpdir(), 'memtables-listing-'));
  try {
    const object = join(directory, 'listing.o');
    const { status, error, stderr } = spawnSync('as', ['--64', '-o', object], {
      input: source,
      encoding: 'utf8',
    });
    if (error !== undefined) throw new Error(`as (GNU binutils) could not be started: ${error.message}`);
    if (status !== 0) throw new Error(`as failed:\n${stderr}\n${source}`);
    return readObject(readFileSync(object));
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

const SHT_SYMTAB = 2;
const SHT_RELA = 4;

function readObject(elf: Buffer): { code: Buffer; symbols: Map<string, number> } {
  const start = Number(elf.readBigUInt64LE(0x28));
  const sections = Array.from({ length: elf.readUInt16LE(0x3c) }, (_, index) => {
    const at = start + index * 64;
    const [offset, size] = [0x18, 0x20].map((field) => Number(elf.readBigUInt64LE(at + field)));
    return {
      name: elf.readUInt32LE(at),
      type: elf.readUInt32LE(at + 4),
      link: elf.readUInt32LE(at + 0x28),
      bytes: elf.subarray(offset, offset! + size!),
    };
  });
  const text = (table: Buffer, at: number) => table.toString('latin1', at, table.indexOf(0, at));
  const names = sections[elf.readUInt16LE(0x3e)]!.bytes;
  const code = sections.findIndex(({ name }) => text(names, name) === '.text');
  if (sections.some(({ type, bytes }) => type === SHT_RELA && bytes.length > 0)) {
    throw new Error('the listing names something that it does not define');
  }
  const table = sections.find(({ type }) => type === SHT_SYMTAB)!;
  const symbols = new Map<string, number>();
  for (let at = 0; at < table.bytes.length; at += 24) {
    if (table.bytes.readUInt16LE(at + 6) !== code) continue;
    const name = text(sections[table.link]!.bytes, table.bytes.readUInt32LE(at));
    symbols.set(name, Number(table.bytes.readBigInt64LE(at + 8)));
  }
  return { code: Buffer.from(sections[code]!.bytes), symbols };
}

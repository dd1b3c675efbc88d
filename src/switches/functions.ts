import { MemtablesError } from '../errors.js';
import { firstIndex } from '../first-index.js';
import type { FunctionTable, RuntimeFunction } from '../nt/pdata.js';
import { type ImageBytes, viewOf } from '../nt/pe.js';

/** A range of addresses relative to the image base; `end` is exclusive. */
export interface CodeRange {
  readonly begin: number;
  readonly end: number;
}

/** The code of one function: all its fragments, or the gap between functions that holds leaf functions. */
export interface FunctionCode {
  /** In ascending order, not overlapping. */
  readonly ranges: readonly CodeRange[];
  /** Where control may come from outside; nothing is known there. */
  readonly roots: readonly number[];
  /** It is such a gap: more functions than the roots say may begin in it. */
  readonly leaf: boolean;
}

/** More than any compiled function has; and gaps of this size are no leaf functions. */
export const MAX_FUNCTION_BYTES = 512 * 1024;
export const START_ALIGNMENT = 16;
const PADDING = 0xcc;
/** A __try block more is not compiled C. */
const MAX_SCOPES = 1024;
const SCOPE_SIZE = 16;

/**
 * The function around `rva`: its `.pdata` fragments, or, where no entry covers it, the whole gap around it.
 * `undefined` outside executable sections.
 */
export function functionAt(image: ImageBytes, table: FunctionTable, rva: number): FunctionCode | undefined {
  const section = image.sectionAt(rva);
  if (section === undefined || !section.executable) return undefined;
  const entry = table.entryAt(rva);
  if (entry !== undefined) {
    const ranges = table.fragmentsOf(entry);
    // The start is not always the lowest fragment: cold ones may lie before it.
    return { ranges, roots: [table.startOf(entry), ...exceptionTargets(image, table, ranges)], leaf: false };
  }
  const gap = table.gapAround(rva, section.rva, section.rva + section.virtualSize);
  return gap.begin === gap.end ? undefined : leafCode(image, gap);
}

/** The one of `ranges`, which ascend and do not overlap, that holds `rva`. */
export function rangeAt<Range extends CodeRange>(ranges: readonly Range[], rva: number): Range | undefined {
  const range = ranges[firstIndex(ranges, ({ end }) => end > rva)];
  return range !== undefined && range.begin <= rva ? range : undefined;
}

/** Leaf functions have no entry: each place that looks like the start of one is taken as a start. */
function leafCode(image: ImageBytes, gap: CodeRange): FunctionCode {
  if (gap.end - gap.begin > MAX_FUNCTION_BYTES) return { ranges: [gap], roots: [], leaf: true };
  const bytes = image.read(gap.begin, gap.end - gap.begin);
  const roots: number[] = [];
  const first = Math.ceil(gap.begin / START_ALIGNMENT) * START_ALIGNMENT;
  for (let rva = first; rva < gap.end; rva += START_ALIGNMENT) {
    const offset = rva - gap.begin;
    const afterPadding = offset === 0 || bytes[offset - 1] === PADDING;
    if (afterPadding && bytes[offset] !== PADDING) roots.push(rva);
  }
  return { ranges: [gap], roots, leaf: true };
}

/** Where `__except` blocks begin: the unwinder jumps there with any register values. */
function exceptionTargets(
  image: ImageBytes,
  table: FunctionTable,
  fragments: readonly RuntimeFunction[],
): number[] {
  const inside = (rva: number) => rangeAt(fragments, rva) !== undefined;
  return fragments.flatMap((fragment) => {
    try {
      const { handler } = table.unwindInfo(fragment);
      return handler === undefined ? [] : scopeTargets(image, handler.dataRva).filter(inside);
    } catch (error) {
      if (error instanceof MemtablesError) return []; // no unwind data that could be followed at run time
      throw error;
    }
  });
}

/** The targets of a C scope table, or nothing where the handler's data is not one: that of a stack cookie, say. */
function scopeTargets(image: ImageBytes, dataRva: number): number[] {
  const count = viewOf(image.read(dataRva, 4)).getUint32(0, true);
  if (count > MAX_SCOPES) return [];
  const scopes = viewOf(image.read(dataRva + 4, count * SCOPE_SIZE));
  const isCode = (rva: number) => image.sectionAt(rva)?.executable === true;
  const targets: number[] = [];
  for (let at = 0; at < count * SCOPE_SIZE; at += SCOPE_SIZE) {
    const [begin, end, filter, target] = [0, 4, 8, 12].map((field) => scopes.getUint32(at + field, true));
    const isScope = begin! <= end! && isCode(begin!) && (filter === 1 || isCode(filter!));
    if (!isScope || (target !== 0 && !isCode(target!))) return [];
    targets.push(target!);
  }
  return targets;
}

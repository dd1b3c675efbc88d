import { firstIndex } from '../first-index.js';
import type { PeImage } from '../nt/pe.js';
import { instabilityOf } from '../slack/regions.js';
import type { CodeRange } from '../switches/functions.js';
import { type LikelyLoad, likelyLoads } from '../switches/scan.js';
import type { FoundSwitch, SwitchPart, SwitchRecogniser } from '../switches/table.js';
import { PAGE_SIZE } from '../vmi/address.js';
import { tablesOf } from './tables.js';

/** The farthest that a switch's tables reach behind the first entry of its dword table. */
const MOST_TABLE_BYTES = 64 * 1024;
/** In real kernels a page brings about 20 others at most. */
const MOST_PAGES = 4096;

/** What hidden bytes bring with them. */
export interface Extension {
  /** The pages that are trapped now, or will be once the switches are relocated; relative to the image. */
  readonly pages: readonly number[];
  readonly switches: readonly FoundSwitch[];
}

/**
 * The pages that hidden bytes trap, and the switches with a table there. The loads of these become hidden bytes, too,
 * once they are relocated, and trap their own pages: the closure of that, computed from the image before it happens.
 */
export class Closure {
  readonly #pages = new Set<number>();
  readonly #switches = new Set<number>();
  /** By their tables, in ascending order. */
  readonly #loads: readonly LikelyLoad[];
  /** The switches of the function around a likely load. */
  readonly #around = new Map<number, readonly FoundSwitch[]>();

  constructor(
    image: PeImage,
    private readonly recogniser: SwitchRecogniser,
  ) {
    const sections = image.sections.filter((section) => instabilityOf(section) === undefined);
    this.#loads = sections
      .flatMap((section) => [...likelyLoads(image, section)])
      .sort((a, b) => a.table - b.table);
  }

  /**
   * What is new when bytes are hidden in these ranges.
   *
   * @param afterEach called after each function that was analysed: the guest may be waiting
   */
  extend(ranges: readonly CodeRange[], afterEach: () => void): Extension {
    const pages: number[] = [];
    const switches: FoundSwitch[] = [];
    const add = (added: readonly CodeRange[]) => {
      for (const page of added.flatMap(pagesOf)) {
        if (this.#pages.has(page) || this.#pages.size >= MOST_PAGES) continue;
        this.#pages.add(page);
        pages.push(page);
      }
    };
    add(ranges);
    // It grows while it is gone through.
    for (const page of pages) {
      for (const found of this.#switchesOn(page, afterEach)) {
        switches.push(found);
        add(loadsOf(found));
      }
    }
    return { pages, switches };
  }

  /** Those with a table on the page that are not known yet. */
  #switchesOn(page: number, afterEach: () => void): FoundSwitch[] {
    const found: FoundSwitch[] = [];
    const end = page + PAGE_SIZE;
    const near = this.#loads.slice(
      firstIndex(this.#loads, ({ table }) => table > page - MOST_TABLE_BYTES),
      firstIndex(this.#loads, ({ table }) => table >= end),
    );
    for (const { rva } of near) {
      for (const each of this.#switchesAround(rva, afterEach)) {
        const isHere = tablesOf(each).some((table) => table.begin < end && table.end > page);
        if (!isHere || this.#switches.has(each.rva)) continue;
        this.#switches.add(each.rva);
        found.push(each);
      }
    }
    return found;
  }

  #switchesAround(rva: number, afterEach: () => void): readonly FoundSwitch[] {
    const known = this.#around.get(rva);
    if (known !== undefined) return known;
    const found = this.recogniser.switchesAround(rva).filter((each) => each.found);
    for (const at of [rva, ...found.flatMap(possibleOpcodes)]) this.#around.set(at, found);
    afterEach();
    return found;
  }
}

/** Where a load has its opcode: at its start, or behind a prefix. */
function possibleOpcodes({ rva }: SwitchPart): readonly number[] {
  return [rva, rva + 1];
}

function rangeOf({ rva, length }: SwitchPart): CodeRange {
  return { begin: rva, end: rva + length };
}

/** What handlers may replace of a switch. */
function loadsOf(found: FoundSwitch): CodeRange[] {
  const { byteTable, add, jmp, adjacent } = found;
  const parts = [found, ...(byteTable === undefined ? [] : [byteTable]), ...(adjacent ? [add, jmp] : [])];
  return parts.map(rangeOf);
}

/** The addresses of the pages that hold a byte of the range. */
function pagesOf({ begin, end }: CodeRange): number[] {
  const pages: number[] = [];
  for (let page = begin - (begin % PAGE_SIZE); page < end; page += PAGE_SIZE) pages.push(page);
  return pages;
}

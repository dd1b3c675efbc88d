import { type Gpa, type Gva, gpaOfFrame, PAGE_SHIFT, PAGE_SIZE } from '../vmi/address.js';

/** What a mapped page allows; anything is readable. */
export interface PageRights {
  readonly write?: boolean;
  readonly execute?: boolean;
  readonly user?: boolean;
}

const PRESENT = 1n;
const WRITABLE = 2n;
const USER = 4n;
const ACCESSED = 0x20n;
const DIRTY = 0x40n;
const NO_EXECUTE = 1n << 63n;

const ENTRIES = 512;
const ENTRY_BYTES = 8;
const INDEX_BITS = 9n;
const LEVELS = 4;
const FRAME_BITS = 0x000f_ffff_ffff_f000n;

/** Builds 4-level page tables of 4 KB pages, to be written to guest memory when they are complete. */
export class PageTableBuilder {
  readonly #tables = new Map<bigint, BigUint64Array>();

  /** `takeFrame` gives a free frame number for each table. */
  constructor(private readonly takeFrame: () => bigint) {}

  /** A new, empty address space; returns its CR3. */
  createRoot(): Gpa {
    return gpaOfFrame(this.#createTable());
  }

  map(root: Gpa, gva: Gva, frame: bigint, rights: PageRights): void {
    let table = this.#tables.get(root >> PAGE_SHIFT)!;
    for (let level = LEVELS - 1; level > 0; level--) {
      const index = indexAt(gva, level);
      if (table[index] === 0n) {
        // The last level restricts; the levels above allow all that it may.
        table[index] = gpaOfFrame(this.#createTable()) | PRESENT | WRITABLE | USER | ACCESSED;
      }
      table = this.#tables.get((table[index]! & FRAME_BITS) >> PAGE_SHIFT)!;
    }
    table[indexAt(gva, 0)] =
      gpaOfFrame(frame) |
      PRESENT |
      ACCESSED |
      DIRTY |
      (rights.write ? WRITABLE : 0n) |
      (rights.user ? USER : 0n) |
      (rights.execute ? 0n : NO_EXECUTE);
  }

  /** Makes the upper half of `to` that of `from`: every process maps the kernel. */
  shareKernelHalf(from: Gpa, to: Gpa): void {
    const source = this.#tables.get(from >> PAGE_SHIFT)!;
    this.#tables.get(to >> PAGE_SHIFT)!.set(source.subarray(ENTRIES / 2), ENTRIES / 2);
  }

  /** Every table with the frame it belongs into. */
  *contents(): Generator<{ readonly gpa: Gpa; readonly bytes: Buffer }> {
    for (const [frame, table] of this.#tables) {
      const bytes = Buffer.alloc(PAGE_SIZE);
      table.forEach((entry, index) => {
        bytes.writeBigUInt64LE(entry, index * ENTRY_BYTES);
      });
      yield { gpa: gpaOfFrame(frame), bytes };
    }
  }

  #createTable(): bigint {
    const frame = this.takeFrame();
    this.#tables.set(frame, new BigUint64Array(ENTRIES));
    return frame;
  }
}

function indexAt(gva: Gva, level: number): number {
  return Number((gva >> (PAGE_SHIFT + INDEX_BITS * BigInt(level))) & BigInt(ENTRIES - 1));
}

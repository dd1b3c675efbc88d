import { MemtablesError } from '../errors.js';
import { firstIndex } from '../first-index.js';
import type { Gva } from '../vmi/address.js';

/** Bytes that are about to change or to go away; a live pointer into them must not exist then. */
export interface LiveRange {
  readonly start: Gva;
  /** Exclusive. */
  readonly end: Gva;
  /** Whose bytes these are: comes back in findings. */
  readonly owner: string;
}

const LOW_DWORD = 0xffff_ffffn;
const DWORD_BITS = 32n;

/** Which of some ranges holds an address, if any does; they may be given in any order and may overlap. */
export class RangeSet {
  private readonly ranges: readonly LiveRange[];
  /** `reach[i]` is the highest end among ranges 0 to i: how far back an overlapping one can begin. */
  private readonly reach: readonly Gva[];
  private readonly lowestHigh: number;
  private readonly highestHigh: number;

  /** @throws MemtablesError `INVALID_ARGUMENT` for an empty or inverted range */
  constructor(ranges: readonly LiveRange[]) {
    for (const { start, end, owner } of ranges) {
      if (start < end) continue;
      throw new MemtablesError('INVALID_ARGUMENT', `the range of ${owner} is empty`, {
        remedy: 'Leave out what has no bytes.',
        context: { start, end, owner },
      });
    }
    this.ranges = [...ranges].sort((a, b) => (a.start < b.start ? -1 : a.start > b.start ? 1 : 0));
    let reach = 0n;
    this.reach = this.ranges.map(({ end }) => {
      if (end > reach) reach = end;
      return reach;
    });
    this.lowestHigh = highDword(this.ranges[0]?.start ?? 0n);
    this.highestHigh = highDword(reach);
  }

  find(value: Gva): LiveRange | undefined {
    const behind = firstIndex(this.ranges, ({ start }) => start > value);
    for (let index = behind - 1; index >= 0 && this.reach[index]! > value; index--) {
      if (value < this.ranges[index]!.end) return this.ranges[index];
    }
    return undefined;
  }

  /**
   * Calls `hit` for every aligned 8-byte value in `bytes` that lies in a range. The high halves alone rule
   * nearly every value out, without a bigint for it.
   */
  scan(bytes: Buffer, hit: (offset: number, value: Gva, range: LiveRange) => void): void {
    if (this.ranges.length === 0) return;
    for (let offset = 0; offset + 8 <= bytes.length; offset += 8) {
      const high = bytes.readUInt32LE(offset + 4);
      if (high < this.lowestHigh || high > this.highestHigh) continue;
      const value = bytes.readBigUInt64LE(offset);
      const range = this.find(value);
      if (range !== undefined) hit(offset, value, range);
    }
  }
}

function highDword(value: Gva): number {
  return Number((value >> DWORD_BITS) & LOW_DWORD);
}

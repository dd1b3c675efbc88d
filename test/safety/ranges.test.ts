import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type LiveRange, RangeSet } from '../../src/safety/ranges.js';

const BASE = 0xffff_f804_ffff_ff00n;

const ranges = fc.array(
  fc.tuple(fc.bigInt(0n, 0x400n), fc.bigInt(1n, 0x80n)).map(
    ([start, length]): LiveRange => ({
      start: BASE + start,
      end: BASE + start + length,
      owner: `${start}`,
    }),
  ),
  { maxLength: 12 },
);

describe('a set of ranges', () => {
  it('includes the first byte of a range, and excludes its end', () => {
    const range = { start: BASE, end: BASE + 0x10n, owner: 'handler' };
    const set = new RangeSet([range]);
    expect(set.find(BASE - 1n)).toBeUndefined();
    expect(set.find(BASE)).toBe(range);
    expect(set.find(BASE + 0xfn)).toBe(range);
    expect(set.find(BASE + 0x10n)).toBeUndefined();
  });

  it('looks past a range that ends where the address is, to the one around it', () => {
    const outer = { start: BASE, end: BASE + 0x100n, owner: 'outer' };
    const inner = { start: BASE + 0x10n, end: BASE + 0x20n, owner: 'inner' };
    expect(new RangeSet([outer, inner]).find(BASE + 0x20n)).toBe(outer);
  });

  it('finds what a search through all of them finds, overlapping ones and those across 4 GB too', () => {
    fc.assert(
      fc.property(ranges, fc.bigInt(-8n, 0x500n), (list, offset) => {
        const value = BASE + offset;
        const wanted = list.some(({ start, end }) => value >= start && value < end);
        const found = new RangeSet(list).find(value);
        expect(found !== undefined).toBe(wanted);
        if (found !== undefined) expect(value >= found.start && value < found.end).toBe(true);
      }),
    );
  });

  it('finds in bytes exactly the aligned values that lie in a range', () => {
    fc.assert(
      fc.property(ranges, fc.array(fc.bigInt(-8n, 0x500n), { maxLength: 20 }), (list, offsets) => {
        const set = new RangeSet(list);
        const bytes = Buffer.alloc(offsets.length * 8);
        offsets.forEach((offset, index) => {
          bytes.writeBigUInt64LE(BASE + offset, index * 8);
        });
        const hits: number[] = [];
        set.scan(bytes, (at) => hits.push(at / 8));
        expect(hits).toEqual(
          [...offsets.keys()].filter((index) => set.find(BASE + offsets[index]!) !== undefined),
        );
      }),
    );
  });

  it('refuses an empty or inverted range', () => {
    for (const end of [BASE, BASE - 1n]) {
      expect(() => new RangeSet([{ start: BASE, end, owner: 'x' }])).toThrow(
        expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
      );
    }
  });
});

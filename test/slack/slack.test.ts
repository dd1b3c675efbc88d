import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Section } from '../../src/nt/pe.js';
import { SlackAllocator, type SlackBlock } from '../../src/slack/allocator.js';
import { findSlack, type SlackRegion } from '../../src/slack/regions.js';
import { type Gva, PAGE_SIZE } from '../../src/vmi/address.js';

const BASE = 0xffff_f800_1234_0000n;

function section(name: string, rva: number, virtualSize: number, flags: Partial<Section> = {}): Section {
  const kind = { executable: true, writable: false, discardable: false, notPaged: true };
  return { index: 0, name, rva, virtualSize, characteristics: 0, ...kind, ...flags };
}

/** An image at `BASE` with code in all its sections and zeros elsewhere. */
function image(...sections: Section[]) {
  const last = sections.at(-1)!;
  const bytes = Buffer.alloc(Math.ceil((last.rva + last.virtualSize) / PAGE_SIZE) * PAGE_SIZE);
  for (const { rva, virtualSize } of sections) bytes.fill(0xc3, rva, rva + virtualSize);
  const read = (gva: Gva, length: number) => {
    const rva = Number(gva - BASE);
    if (rva + length > bytes.length) throw new Error('a read outside the image');
    return bytes.subarray(rva, rva + length);
  };
  return { bytes, slack: () => findSlack(BASE, sections, read) };
}

describe('findSlack', () => {
  it('is what lies between the end of a section and the end of its last page', () => {
    const { slack } = image(section('.text', 0x1000, 0x2345), section('POOLCODE', 0x4000, 0xff0));
    expect(slack()).toEqual([
      { section: '.text', gva: BASE + 0x3345n, size: 0xcbb },
      { section: 'POOLCODE', gva: BASE + 0x4ff0n, size: 0x10 },
    ]);
  });

  it.each([
    ['data', section('.rdata', 0x1000, 0x100, { executable: false })],
    ['writable code', section('.text', 0x1000, 0x100, { writable: true })],
    ['discardable code', section('.text', 0x1000, 0x100, { discardable: true })],
    ['code that is paged out', section('PAGE', 0x1000, 0x100)],
    ['code that is paged out, by its longer name', section('PAGEVRFY', 0x1000, 0x100)],
    ['code that is freed after boot', section('INIT', 0x1000, 0x100)],
    ['code that the debugger overwrites', section('INITKDBG', 0x1000, 0x100)],
    ['code mapped under the user page table', section('KVASCODE', 0x1000, 0x100)],
    ['a section that fills its last page', section('.text', 0x1000, 0x1000)],
  ])('there is none in %s', (_name, only) => {
    expect(image(only).slack()).toEqual([]);
  });

  it('does not take bytes that something has been written to', () => {
    const one = image(section('.text', 0x1000, 0x800));
    one.bytes[0x1900] = 1;
    expect(one.slack()).toEqual([{ section: '.text', gva: BASE + 0x1901n, size: 0x6ff }]);
    one.bytes[0x1fff] = 1;
    expect(one.slack()).toEqual([]);
  });

  it('ends where the next section begins, if that is before the end of the page', () => {
    const { slack } = image(section('.text', 0x1000, 0x100), section('.more', 0x1200, 0x100));
    expect(slack()).toEqual([
      { section: '.text', gva: BASE + 0x1100n, size: 0x100 },
      { section: '.more', gva: BASE + 0x1300n, size: 0xd00 },
    ]);
  });
});

const zeros = (_gva: Gva, length: number) => new Uint8Array(length);

describe('SlackAllocator', () => {
  const regions: SlackRegion[] = [
    { section: 'A', gva: BASE, size: 100 },
    { section: 'B', gva: BASE + 0x1000n, size: 300 },
  ];

  it('takes the first section with room', () => {
    const slack = new SlackAllocator(regions, zeros);
    expect(slack.allocate(60)).toEqual({ section: 'A', gva: BASE, size: 60 });
    expect(slack.allocate(60)).toEqual({ section: 'B', gva: BASE + 0x1000n, size: 60 });
    expect(slack.allocate(40)).toEqual({ section: 'A', gva: BASE + 60n, size: 40 });
    expect(slack.freeMap).toEqual([{ section: 'B', gva: BASE + 0x103cn, size: 240 }]);
    expect([slack.bytes, slack.freeBytes]).toEqual([400, 240]);
  });

  it('says what is free when nothing fits, and has reserved nothing', () => {
    const slack = new SlackAllocator(regions, zeros);
    slack.allocate(250);
    expect(() => slack.allocate(101)).toThrow(
      expect.objectContaining({
        code: 'SLACK_EXHAUSTED',
        context: {
          size: 101,
          free: 150,
          holes: [
            { section: 'A', gva: BASE, size: 100 },
            { section: 'B', gva: BASE + 0x10fan, size: 50 },
          ],
        },
      }),
    );
    expect(slack.freeBytes).toBe(150);
  });

  it.each([0, -1, 1.5, Number.NaN])('a size of %s is refused', (size) => {
    expect(() => new SlackAllocator(regions, zeros).allocate(size)).toThrow(
      expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
    );
  });

  it('a block is freed once, and only a block of its own', () => {
    const slack = new SlackAllocator(regions, zeros);
    const block = slack.allocate(10);
    expect(() => slack.free({ ...block })).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
    slack.free(block);
    expect(() => slack.free(block)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
    expect(slack.freeMap).toEqual(regions);
  });

  it('never hands out bytes that are in use by now, nor joins them to others', () => {
    const used = BASE + 0x1000n + 70n;
    const slack = new SlackAllocator(regions, (gva, length) =>
      Uint8Array.from({ length }, (_, i) => (gva + BigInt(i) === used ? 1 : 0)),
    );
    const first = slack.allocate(90);
    expect(first.section).toBe('A');
    const second = slack.allocate(90);
    expect(second.gva).toBe(BASE + 0x1000n + 90n);
    slack.free(second);
    expect(slack.allocate(200).gva).toBe(BASE + 0x1000n + 90n);
    expect(() => slack.allocate(90)).toThrow(expect.objectContaining({ code: 'SLACK_EXHAUSTED' }));
  });

  it('does not join regions that touch: they belong to different sections', () => {
    const touching = [
      { section: 'A', gva: BASE, size: 16 },
      { section: 'B', gva: BASE + 16n, size: 16 },
    ];
    const slack = new SlackAllocator(touching, zeros);
    slack.free(slack.allocate(16));
    expect(slack.freeMap).toEqual(touching);
    expect(() => slack.allocate(17)).toThrow(expect.objectContaining({ code: 'SLACK_EXHAUSTED' }));
  });

  it('any sequence of requests: no overlap, all inside, holes are what is left, and all comes back', () => {
    const request = fc.oneof(
      fc.record({ allocate: fc.integer({ min: 1, max: 120 }) }),
      fc.record({ free: fc.nat() }),
    );
    fc.assert(
      fc.property(fc.array(request, { maxLength: 60 }), (requests) => {
        const slack = new SlackAllocator(regions, zeros);
        const blocks: SlackBlock[] = [];
        for (const each of requests) {
          if ('free' in each) {
            if (blocks.length > 0) slack.free(blocks.splice(each.free % blocks.length, 1)[0]!);
          } else if (slack.freeMap.some(({ size }) => size >= each.allocate)) {
            blocks.push(slack.allocate(each.allocate));
          } else {
            expect(() => slack.allocate(each.allocate)).toThrow();
          }
          expectPartition([...blocks, ...slack.freeMap]);
          for (const [i, hole] of slack.freeMap.entries()) {
            expect(slack.freeMap[i + 1]?.gva).not.toBe(hole.gva + BigInt(hole.size));
          }
        }
        for (const block of blocks) slack.free(block);
        expect(slack.freeMap).toEqual(regions);
      }),
      { numRuns: 300 },
    );
  });

  /** The pieces cover every byte of every region exactly once, under the region's name. */
  function expectPartition(pieces: readonly SlackRegion[]) {
    for (const region of regions) {
      const own = pieces.filter((piece) => piece.section === region.section);
      own.sort((a, b) => (a.gva < b.gva ? -1 : 1));
      let at = region.gva;
      for (const piece of own) {
        expect(piece.gva).toBe(at);
        at += BigInt(piece.size);
      }
      expect(at).toBe(region.gva + BigInt(region.size));
    }
  }
});

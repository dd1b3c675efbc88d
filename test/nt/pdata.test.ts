import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { FunctionTable } from '../../src/nt/pdata.js';
import { DIRECTORY, PeImage } from '../../src/nt/pe.js';
import { functionAt } from '../../src/switches/functions.js';
import { resultOrCode } from './hostile.js';
import { buildPe, buildUnwindData, FLAGS, type FunctionEntry } from './pe-builder.js';

const TEXT_RVA = 0x1000;
const TEXT_SIZE = 0x800;
const PDATA = 0x2000;

function imageWith(bytes: Buffer, directory: { rva: number; size: number }): PeImage {
  return PeImage.fromFile(
    buildPe({
      sections: [
        { name: '.text', rva: TEXT_RVA, bytes: Buffer.alloc(TEXT_SIZE, 0x90), flags: FLAGS.code },
        { name: '.pdata', rva: PDATA, bytes, flags: FLAGS.data },
      ],
      directories: { [DIRECTORY.exception]: directory },
    }),
  );
}

function tableOf(functions: readonly FunctionEntry[]): {
  image: PeImage;
  table: FunctionTable;
  bytes: Buffer;
} {
  const { bytes, directory } = buildUnwindData(functions, PDATA);
  const image = imageWith(bytes, directory);
  return { image, table: FunctionTable.read(image), bytes };
}

const FIRST = { begin: 0x1100, end: 0x1180 };
const SECOND = { begin: 0x1180, end: 0x1200, handlers: [0x11c0] };
const COLD: FunctionEntry = { begin: 0x1040, end: 0x1060, chainedTo: FIRST };
const COLDER: FunctionEntry = { begin: 0x1300, end: 0x1310, chainedTo: COLD };

describe('FunctionTable', () => {
  const { image, table } = tableOf([FIRST, SECOND, COLD, COLDER]);

  it('finds the entry around an address', () => {
    const begins = [0x10ff, 0x1100, 0x117f, 0x1180, 0x11ff, 0x1200].map((rva) => table.entryAt(rva)?.begin);
    expect(begins).toEqual([undefined, 0x1100, 0x1100, 0x1180, 0x1180, undefined]);
    expect(table.entryAt(0)).toBeUndefined();
    expect(table.entryAt(0xffff_ffff)).toBeUndefined();
  });

  it('finds the gap around an address', () => {
    const gap = (rva: number) => table.gapAround(rva, TEXT_RVA, TEXT_RVA + TEXT_SIZE);
    expect(gap(0x1000)).toEqual({ begin: 0x1000, end: 0x1040 });
    expect(gap(0x1080)).toEqual({ begin: 0x1060, end: 0x1100 });
    expect(gap(0x1500)).toEqual({ begin: 0x1310, end: 0x1800 });
    expect(gap(0x1100)).toEqual({ begin: 0x1100, end: 0x1100 });
  });

  it('follows chained unwind data to the whole function, and to where it begins', () => {
    for (const rva of [0x1100, 0x1050, 0x1300]) {
      const entry = table.entryAt(rva)!;
      expect(table.startOf(entry)).toBe(0x1100);
      expect(table.fragmentsOf(entry).map(({ begin }) => begin)).toEqual([0x1040, 0x1100, 0x1300]);
    }
  });

  it("a function's roots are its start and its __except blocks", () => {
    expect(functionAt(image, table, 0x1305)).toEqual({
      ranges: [0x1040, 0x1100, 0x1300].map((begin) => expect.objectContaining({ begin })),
      roots: [0x1100],
      leaf: false,
    });
    expect(functionAt(image, table, 0x1180)?.roots).toEqual([0x1180, 0x11c0]);
    expect(functionAt(image, table, PDATA)).toBeUndefined();
  });

  it('an image without .pdata has one gap in each section', () => {
    const none = FunctionTable.read(PeImage.fromFile(buildPe({ sections: [] })));
    expect(none.entries).toEqual([]);
    expect(none.gapAround(5, 0, 10)).toEqual({ begin: 0, end: 10 });
  });

  it('entries of zeros are padding', () => {
    const { bytes, directory } = buildUnwindData([FIRST, SECOND], PDATA);
    const padded = Buffer.concat([Buffer.alloc(24), bytes]);
    const { entries } = FunctionTable.read(imageWith(padded, { ...directory, size: directory.size + 24 }));
    expect(entries.map(({ begin }) => begin)).toEqual([0x1100, 0x1180]);
  });

  it.each([
    ['entries that overlap', 12, 0x117f],
    ['entries that are not sorted', 12, 0x10f0],
    ['an entry that ends before it begins', 4, 0x1000],
    ['an entry that ends behind the image', 4, 0x7000],
    ['unwind data outside the image', 8, 0x7000],
  ])('%s', (_, at, value) => {
    const { bytes, directory } = buildUnwindData([FIRST, SECOND], PDATA);
    bytes.writeUInt32LE(value, at);
    expect(() => FunctionTable.read(imageWith(bytes, directory))).toThrow(
      expect.objectContaining({ code: 'IMAGE_INVALID' }),
    );
  });

  it('a directory of more entries than any image has', () => {
    const size = 13 << 20;
    const image = PeImage.fromFile(
      buildPe({
        sections: [
          { name: '.pdata', rva: PDATA, bytes: Buffer.alloc(16), flags: FLAGS.data, virtualSize: size },
        ],
        directories: { [DIRECTORY.exception]: { rva: PDATA, size } },
      }),
    );
    expect(() => FunctionTable.read(image)).toThrow(expect.objectContaining({ code: 'IMAGE_INVALID' }));
  });
});

describe('damaged unwind data', () => {
  /** The unwind data of COLD, chained to FIRST, with one field changed. */
  function damaged(change: (bytes: Buffer, unwind: number) => void) {
    const { bytes, directory } = buildUnwindData([FIRST, COLD], PDATA);
    change(bytes, bytes.readUInt32LE(8) - PDATA);
    const image = imageWith(bytes, directory);
    const table = FunctionTable.read(image);
    return { image, table, cold: table.entries[0]! };
  }

  it.each([
    ['of an unknown version', (bytes: Buffer, unwind: number) => bytes.writeUInt8(0x27, unwind)],
    ['chained to itself', (bytes: Buffer, unwind: number) => bytes.copy(bytes, unwind + 4, 0, 12)],
    [
      'chained to what is outside the image',
      (bytes: Buffer, unwind: number) => bytes.writeUInt32LE(0x9000, unwind + 8),
    ],
    ['chained, by its address, to itself', (bytes: Buffer) => bytes.writeUInt32LE(PDATA + 1, 8)],
    [
      'with more codes than the image has bytes',
      (bytes: Buffer, unwind: number) => {
        bytes.writeUInt32LE(PDATA + 0xffc, 8);
        bytes.writeUInt8(0, unwind);
      },
    ],
  ])('%s: the entry is a function of its own', (_, change) => {
    const { image, table, cold } = damaged(change);
    expect(table.startOf(cold)).toBe(cold.begin);
    expect(table.fragmentsOf(cold)).toEqual([cold]);
    expect(functionAt(image, table, cold.begin)).toMatchObject({ ranges: [cold], roots: [cold.begin] });
  });

  it('an address that names another entry is followed', () => {
    const { table, cold } = damaged((bytes) => bytes.writeUInt32LE((PDATA + 12) | 1, 8));
    expect(table.startOf(cold)).toBe(0x1100);
  });

  it('a scope table of any size is looked at only as far as it is one', () => {
    for (const count of [0, 1, 2, 1024, 1025, 0xffff_ffff]) {
      const { bytes, directory } = buildUnwindData([SECOND], PDATA);
      bytes.writeUInt32LE(count, 12 + 8);
      const image = imageWith(bytes, directory);
      const roots = functionAt(image, FunctionTable.read(image), 0x1180)!.roots;
      expect(roots[0]).toBe(0x1180);
      for (const root of roots) expect(root >= 0x1180 && root < 0x1200).toBe(true);
    }
  });

  it('any damage is an error of the image, or functions inside it', () => {
    const { bytes, directory } = buildUnwindData([FIRST, SECOND, COLD, COLDER], PDATA);
    const change = fc.record({
      at: fc.nat(bytes.length - 1),
      value: fc.oneof(fc.nat(255), fc.constantFrom(0, 0xff)),
    });
    fc.assert(
      fc.property(fc.array(change, { minLength: 1, maxLength: 6 }), (changes) => {
        const copy = Buffer.from(bytes);
        for (const { at, value } of changes) copy[at] = value;
        const image = imageWith(copy, directory);
        const table = resultOrCode(() => FunctionTable.read(image));
        if (typeof table === 'string') return;
        for (const entry of table.entries) {
          const ranges = functionAt(image, table, entry.begin)?.ranges ?? [];
          for (const { begin, end } of ranges) expect(begin < end && end <= image.sizeOfImage).toBe(true);
        }
      }),
      { numRuns: 500 },
    );
  });
});

import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { DIRECTORY, PeImage } from '../../src/nt/pe.js';
import { DISPATCH, GUARDED, withTable } from '../switches/cases.js';
import { assemble } from '../switches/listing.js';
import { readEverything, resultOrCode } from './hostile.js';
import { buildPe, FLAGS, OFFSETS } from './pe-builder.js';

const TEXT = { name: '.text', rva: 0x1000, bytes: Buffer.alloc(0x300, 0xc3), flags: FLAGS.code };
const DATA = {
  name: '.data',
  rva: 0x2000,
  bytes: Buffer.from('data'),
  flags: FLAGS.writableData,
  virtualSize: 0x1800,
};

/** A file with one field changed. */
function changed(offset: number, value: number, size: 2 | 4 = 4, sections = [TEXT, DATA]): Buffer {
  const file = buildPe({ sections });
  file.writeUIntLE(value, offset, size);
  return file;
}

const codeOf = (file: Uint8Array) => {
  const result = resultOrCode(() => PeImage.fromFile(file));
  return typeof result === 'string' ? result : 'an image';
};

describe('PeImage.fromFile', () => {
  const image = PeImage.fromFile(buildPe({ sections: [TEXT, DATA] }));

  it('reads the headers', () => {
    expect(image).toMatchObject({
      imageBase: 0x1_4000_0000n,
      entryPoint: 0x1000,
      sizeOfImage: 0x4000,
      sizeOfHeaders: 0x200,
      timeDateStamp: 0x5f000000,
    });
    expect(image.sections).toMatchObject([
      { index: 0, name: '.text', rva: 0x1000, virtualSize: 0x300, executable: true, writable: false },
      { index: 1, name: '.data', rva: 0x2000, virtualSize: 0x1800, executable: false, writable: true },
    ]);
  });

  it('reads what the loader would map: the file, and zeros where it holds nothing', () => {
    expect(image.read(0, 2).toString()).toBe('77,90');
    expect([...image.read(0x12fe, 4)]).toEqual([0xc3, 0xc3, 0, 0]);
    expect(Buffer.from(image.read(0x2000, 6)).toString()).toBe('data\0\0');
    expect([...image.read(0x37ff, 2)]).toEqual([0, 0]);
    expect(image.read(0x4000, 0)).toHaveLength(0);
  });

  it('finds the section of an address', () => {
    expect(
      [0xfff, 0x1000, 0x12ff, 0x1300, 0x2000, 0x37ff, 0x3800].map((rva) => image.sectionAt(rva)?.name),
    ).toEqual([undefined, '.text', '.text', undefined, '.data', '.data', undefined]);
  });

  it.each([
    ['before the image', -1, 1],
    ['behind the image', 0x4000, 1],
    ['across the end', 0x3fff, 2],
    ['of a negative length', 0x1000, -1],
    ['of no whole number of bytes', 0x1000, 1.5],
    ['from nowhere', Number.NaN, 1],
    ['of more than any structure has', 0, 65 << 20],
  ])('a read %s is refused', (_, rva, length) => {
    expect(() => image.read(rva, length)).toThrow(expect.objectContaining({ code: 'IMAGE_INVALID' }));
  });

  it('a section without a virtual size has its raw size', () => {
    const file = changed(OFFSETS.sections + 8, 0, 4, [TEXT]);
    expect(PeImage.fromFile(file).sections[0]).toMatchObject({ virtualSize: 0x400 });
  });

  it('a file position is rounded down to a sector, as the loader does it', () => {
    const file = changed(OFFSETS.sections + 20, 0x2ff);
    expect([...PeImage.fromFile(file).read(0x1000, 1)]).toEqual([0xc3]);
  });

  it('a file position of 2 GB and more is not one before the end of the file', () => {
    expect(codeOf(changed(OFFSETS.sections + 20, 0xffff_fe00))).toBe('IMAGE_INVALID');
    expect(codeOf(changed(OFFSETS.sections + 20, 0x8000_0000))).toBe('IMAGE_INVALID');
  });

  it('an image without sections has nothing but headers', () => {
    const empty = PeImage.fromFile(buildPe({ sections: [] }));
    expect(empty.sections).toEqual([]);
    expect(empty.sectionAt(0)).toBeUndefined();
  });
});

describe('a file that is no x86-64 image', () => {
  it.each([
    ['nothing', Buffer.alloc(0), 'IMAGE_INVALID'],
    ['one byte', Buffer.from('M'), 'IMAGE_INVALID'],
    ['MZ and nothing else', Buffer.from('MZ'.padEnd(64, '\0')), 'IMAGE_INVALID'],
    ['text', Buffer.from('#!/bin/sh\n'.repeat(100)), 'IMAGE_INVALID'],
    ['an ELF file', Buffer.concat([Buffer.from('\x7fELF'), Buffer.alloc(200)]), 'IMAGE_INVALID'],
    ['no PE signature', changed(OFFSETS.nt, 0x4551), 'IMAGE_INVALID'],
    ['32-bit x86', changed(OFFSETS.file, 0x14c, 2), 'GUEST_UNSUPPORTED'],
    ['ARM64', changed(OFFSETS.file, 0xaa64, 2), 'GUEST_UNSUPPORTED'],
    ['an unknown machine', changed(OFFSETS.file, 0xfff0, 2), 'GUEST_UNSUPPORTED'],
    ['an optional header of 32 bits', changed(OFFSETS.optional, 0x10b, 2), 'IMAGE_INVALID'],
    ['an optional header that is too short', changed(OFFSETS.file + 16, 111, 2), 'IMAGE_INVALID'],
    ['an optional header of 64 KB', changed(OFFSETS.file + 16, 0xffff, 2), 'IMAGE_INVALID'],
    ['a PE header before the DOS header ends', changed(0x3c, 4), 'IMAGE_INVALID'],
    ['a PE header at 4 GB', changed(0x3c, 0xffff_ffff), 'IMAGE_INVALID'],
    ['65535 sections', changed(OFFSETS.file + 2, 0xffff, 2), 'IMAGE_INVALID'],
    ['one section more than the table has', changed(OFFSETS.file + 2, 97, 2), 'IMAGE_INVALID'],
    ['an image of 4 GB', changed(OFFSETS.optional + 56, 0xffff_ffff), 'IMAGE_INVALID'],
    ['an image of nothing', changed(OFFSETS.optional + 56, 0), 'IMAGE_INVALID'],
    ['headers larger than the image', changed(OFFSETS.optional + 60, 0x5000), 'IMAGE_INVALID'],
    ['headers larger than the file', changed(OFFSETS.optional + 60, 0x1000), 'IMAGE_INVALID'],
    ['headers smaller than the section table', changed(OFFSETS.optional + 60, 0x100), 'IMAGE_INVALID'],
    ['17 directories', changed(OFFSETS.optional + 108, 17), 'IMAGE_INVALID'],
    ['a section in the headers', changed(OFFSETS.sections + 12, 0x100), 'IMAGE_INVALID'],
    ['a section behind the image', changed(OFFSETS.sections + 12, 0x4000), 'IMAGE_INVALID'],
    ['a section that wraps around', changed(OFFSETS.sections + 8, 0xffff_ffff), 'IMAGE_INVALID'],
    ['sections that overlap', changed(OFFSETS.sections + 40 + 12, 0x1200), 'IMAGE_INVALID'],
    ['a section that reaches behind the file', changed(OFFSETS.sections + 20, 0x600), 'IMAGE_INVALID'],
  ])('%s', (_, file, code) => {
    expect(codeOf(file)).toBe(code);
  });

  it.each([
    ['behind the image', 0x5000, 0x10],
    ['larger than the image', 0x1000, 0xffff_ffff],
  ])('a directory %s', (_, rva, size) => {
    const directories = { [DIRECTORY.export]: { rva, size } };
    const image = PeImage.fromFile(buildPe({ sections: [TEXT], directories }));
    expect(() => image.directory(DIRECTORY.export)).toThrow(
      expect.objectContaining({ code: 'IMAGE_INVALID' }),
    );
    expect(image.directory(DIRECTORY.debug)).toBeUndefined();
  });
});

describe('PeImage.fromMemory', () => {
  const mapped = Buffer.alloc(0x4000);
  buildPe({ sections: [TEXT, DATA] }).copy(mapped, 0, 0, 0x200);
  mapped.fill(0xc3, 0x1000, 0x1300);

  it('reads each page once, and then keeps to what it saw', () => {
    const memory = Buffer.from(mapped);
    const reads: number[] = [];
    const image = PeImage.fromMemory((rva, length) => {
      reads.push(rva);
      return memory.subarray(rva, rva + length);
    });
    expect([...image.read(0xfff, 2)]).toEqual([0, 0xc3]);
    memory.fill(0x90);
    expect([...image.read(0x1000, 2)]).toEqual([0xc3, 0xc3]);
    expect(image.read(0x1ffe, 0x1004)).toHaveLength(0x1004);
    expect(reads).toEqual([0, 0x1000, 0x2000, 0x3000]);
  });

  it('errors of the reader pass through, and a short read is one', () => {
    const absent = new Error('not mapped');
    const image = PeImage.fromMemory((rva, length) => {
      if (rva === 0x2000) throw absent;
      return mapped.subarray(rva, rva + (rva === 0x3000 ? 12 : length));
    });
    expect(() => image.read(0x1ff0, 0x20)).toThrow(absent);
    expect(() => image.read(0x3000, 1)).toThrow(expect.objectContaining({ code: 'IMAGE_INVALID' }));
  });
});

describe('damaged images', () => {
  const { file } = assemble(withTable(`${GUARDED}${DISPATCH}`));
  const HEADERS = OFFSETS.sections + 3 * 40;

  it('cut off at any length', () => {
    expect(readEverything(file)).toBe(true);
    // Of the last sector the end is padding.
    const sector = file.length - 0x200;
    for (let length = 0; length < file.length; length++) {
      const isImage = readEverything(file.subarray(0, length));
      if (length <= sector) expect(isImage, `${length} bytes`).toBe(false);
    }
  });

  it('every 16-bit field of the headers with every kind of value', () => {
    let images = 0;
    for (let at = 0; at < HEADERS; at += 2) {
      for (const value of [0, 1, 0x7fff, 0x8000, 0xffff]) {
        const copy = Buffer.from(file);
        copy.writeUInt16LE(value, at);
        if (readEverything(copy)) images++;
      }
    }
    expect(images).toBeGreaterThan(100); // many fields do not matter
  });

  it('several fields at once', () => {
    const field = fc.record({
      at: fc.integer({ min: 0, max: (HEADERS - 4) / 4 }),
      value: fc.oneof(
        fc.constantFrom(0, 1, 0x1000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff),
        fc.integer({ min: 0, max: 0xffff_ffff }),
        fc.integer({ min: 0, max: 0x20000 }),
      ),
    });
    fc.assert(
      fc.property(fc.array(field, { minLength: 1, maxLength: 4 }), (fields) => {
        const copy = Buffer.from(file);
        for (const { at, value } of fields) copy.writeUInt32LE(value, at * 4);
        readEverything(copy);
      }),
      { numRuns: 300 },
    );
  });

  it('bytes behind the headers: code, tables and unwind data', () => {
    const change = fc.record({ at: fc.integer({ min: 0x200, max: file.length - 1 }), value: fc.nat(255) });
    fc.assert(
      fc.property(fc.array(change, { minLength: 1, maxLength: 12 }), (changes) => {
        const copy = Buffer.from(file);
        for (const { at, value } of changes) copy[at] = value;
        expect(readEverything(copy)).toBe(true);
      }),
      { numRuns: 300 },
    );
  });
});

import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ExportTable } from '../../src/nt/exports.js';
import { DIRECTORY, PeImage } from '../../src/nt/pe.js';
import { resultOrCode } from './hostile.js';
import { buildPe, FLAGS } from './pe-builder.js';

const RVA = 0x2000;
const SIZE = 0x400;
/** Offsets in the directory. */
const FIELD = { functionCount: 20, nameCount: 24, functions: 28, names: 32, ordinals: 36 };
const FUNCTIONS = 0x40;
const NAMES = 0x80;
const ORDINALS = 0xc0;
const TEXT = 0x100;

interface Export {
  readonly name: string;
  readonly rva: number;
}

/** `.edata` with these exports; their order of ordinals is the reverse of that of their names. */
function directoryOf(exports: readonly Export[]): Buffer {
  const bytes = Buffer.alloc(SIZE);
  const field = (at: number, value: number) => bytes.writeUInt32LE(value, at);
  field(FIELD.functionCount, exports.length);
  field(FIELD.nameCount, exports.length);
  field(FIELD.functions, RVA + FUNCTIONS);
  field(FIELD.names, RVA + NAMES);
  field(FIELD.ordinals, RVA + ORDINALS);
  let text = TEXT;
  exports.forEach(({ name, rva }, index) => {
    const ordinal = exports.length - 1 - index;
    field(FUNCTIONS + ordinal * 4, rva);
    field(NAMES + index * 4, RVA + text);
    bytes.writeUInt16LE(ordinal, ORDINALS + index * 2);
    text += bytes.write(`${name}\0`, text, 'latin1');
  });
  return bytes;
}

function imageWith(directory: Buffer, size = SIZE): PeImage {
  return PeImage.fromFile(
    buildPe({
      sections: [
        { name: '.text', rva: 0x1000, bytes: Buffer.alloc(0x200, 0xc3), flags: FLAGS.code },
        { name: '.edata', rva: RVA, bytes: directory, flags: FLAGS.data },
      ],
      directories: { [DIRECTORY.export]: { rva: RVA, size } },
    }),
  );
}

const EXPORTS = [
  { name: 'NtClose', rva: 0x1010 },
  { name: 'NtOpenProcess', rva: 0x1020 },
  { name: 'RtlForwarded', rva: RVA + 0x300 },
  { name: 'Unused', rva: 0 },
];

describe('ExportTable', () => {
  const table = ExportTable.read(imageWith(directoryOf(EXPORTS)));

  it('finds names by their ordinals', () => {
    expect([...table.entries()]).toEqual([
      ['NtClose', 0x1010],
      ['NtOpenProcess', 0x1020],
    ]);
    expect(table.rvaOf('NtOpenProcess')).toBe(0x1020);
    expect(table.has('ntclose')).toBe(false);
  });

  it.each([
    ['RtlForwarded', /forwarded/],
    ['Unused', /not exported/],
    ['NtOpen', /not exported/],
    ['', /not exported/],
  ])('%j has no address', (name, message) => {
    expect(() => table.rvaOf(name)).toThrow(
      expect.objectContaining({ code: 'SYMBOL_NOT_FOUND', message: expect.stringMatching(message) }),
    );
  });

  it('an image without exports has an empty table', () => {
    const image = PeImage.fromFile(buildPe({ sections: [] }));
    expect([...ExportTable.read(image).entries()]).toEqual([]);
  });

  it.each([
    ['more functions than ordinals can name', FIELD.functionCount, 65537],
    ['4 billion names', FIELD.nameCount, 0xffff_ffff],
    ['names outside the image', FIELD.names, 0xffff_fff0],
    ['functions outside the image', FIELD.functions, 0x7fff_ffff],
    ['ordinals outside the image', FIELD.ordinals, 0x3000],
    ['an ordinal without a function', ORDINALS, 0xffff],
    ['a name outside the image', NAMES, 0x9000],
    ['a function outside the image', FUNCTIONS, 0x9000],
    ['no functions for the names', FIELD.functionCount, 0],
  ])('%s', (_, at, value) => {
    const directory = directoryOf(EXPORTS);
    directory.writeUInt32LE(value, at);
    expect(() => ExportTable.read(imageWith(directory))).toThrow(
      expect.objectContaining({ code: 'IMAGE_INVALID' }),
    );
  });

  it('a name that does not end', () => {
    const directory = directoryOf(EXPORTS);
    directory.fill(0x41, TEXT);
    const image = PeImage.fromFile(
      buildPe({
        sections: [
          {
            name: '.edata',
            rva: RVA,
            bytes: Buffer.concat([directory, Buffer.alloc(0x2000, 0x41)]),
            flags: FLAGS.data,
          },
        ],
        directories: { [DIRECTORY.export]: { rva: RVA, size: SIZE } },
      }),
    );
    expect(() => ExportTable.read(image)).toThrow(expect.objectContaining({ code: 'IMAGE_INVALID' }));
  });

  it('many names that are all the same long text are not read for ever', () => {
    const names = 65536;
    const long = Buffer.concat([Buffer.alloc(500, 0x41), Buffer.alloc(1)]);
    const directory = directoryOf(EXPORTS.slice(0, 1));
    const namesRva = RVA + 0x1000;
    const bytes = Buffer.alloc(0x1000 + names * 6 + long.length);
    directory.copy(bytes);
    bytes.writeUInt32LE(names, FIELD.nameCount);
    bytes.writeUInt32LE(namesRva, FIELD.names);
    bytes.writeUInt32LE(namesRva + names * 4, FIELD.ordinals);
    for (let n = 0; n < names; n++) bytes.writeUInt32LE(namesRva + names * 6, 0x1000 + n * 4);
    long.copy(bytes, 0x1000 + names * 6);
    expect(() => ExportTable.read(imageWith(bytes, bytes.length))).toThrow(
      expect.objectContaining({ code: 'IMAGE_INVALID' }),
    );
  });

  it('any damage is an error of the image, or a table inside it', () => {
    const change = fc.record({ at: fc.nat(0x120), value: fc.oneof(fc.nat(255), fc.constantFrom(0, 0xff)) });
    fc.assert(
      fc.property(fc.array(change, { minLength: 1, maxLength: 8 }), (changes) => {
        const directory = directoryOf(EXPORTS);
        for (const { at, value } of changes) directory[at] = value;
        const image = imageWith(directory);
        const result = resultOrCode(() => ExportTable.read(image));
        if (typeof result === 'string') return;
        for (const [, rva] of result.entries()) expect(rva).toBeLessThan(image.sizeOfImage);
      }),
      { numRuns: 500 },
    );
  });
});

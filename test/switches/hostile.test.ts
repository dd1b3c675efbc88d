// Code that is made to take long. Nothing here asserts on time: a scan that does not end fails by its test's limit.
import { describe, expect, it } from 'vitest';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage } from '../../src/nt/pe.js';
import { scanImage } from '../../src/switches/scan.js';
import { SwitchRecogniser } from '../../src/switches/table.js';
import { buildPe, buildUnwindData, FLAGS, type FunctionEntry } from '../nt/pe-builder.js';

const CODE = 0x1000;
const KB = 1024;

/** An image with `code`, and `.pdata` for the given functions (default: one of all the code). */
function imageOf(
  code: Buffer,
  functions: readonly FunctionEntry[] | 'all' = 'all',
  virtualSize = code.length,
): PeImage {
  const rva = CODE + Math.ceil(virtualSize / 0x1000) * 0x1000;
  const all = [{ begin: CODE, end: CODE + code.length }];
  const unwind = buildUnwindData(functions === 'all' ? all : functions, rva);
  return PeImage.fromFile(
    buildPe({
      sections: [
        { name: '.text', rva: CODE, bytes: code, flags: FLAGS.code, virtualSize },
        { name: '.pdata', rva, bytes: unwind.bytes, flags: FLAGS.data },
      ].filter(({ bytes }) => bytes.length > 0),
      directories: unwind.directory.size === 0 ? {} : { 3: unwind.directory },
    }),
  );
}

function repeated(length: number, piece: (at: number) => number[]): Buffer {
  const bytes = Buffer.alloc(length, 0xcc);
  for (let at = 0; ; ) {
    const next = piece(at);
    if (at + next.length > length) return bytes;
    bytes.set(next, at);
    at += next.length;
  }
}

const dword = (value: number) => [...Buffer.from(Int32Array.of(value).buffer)];
/** lea rdx, [rip+image] at offset `at` of the code */
const lea = (at: number) => [0x48, 0x8d, 0x15, ...dword(-(CODE + at + 7))];
const load = (table: number) => [0x8b, 0x8c, 0x82, ...dword(table)];
const ADD_JMP = [0x48, 0x01, 0xd1, 0xff, 0xe1];

describe('a scan ends', () => {
  it.each([
    ['nothing but table loads', () => repeated(100 * KB, (at) => load(CODE + ((at * 7) % (100 * KB))))],
    [
      'nothing but whole switches without guards, each with a table of its own',
      () => repeated(60 * KB, (at) => [...lea(at), ...load(CODE + ((at * 13) % (50 * KB))), ...ADD_JMP]),
    ],
    [
      'nothing but guarded switches',
      () =>
        repeated(60 * KB, (at) => [
          ...[0x3c, 0x40, 0x77, 0x02], // cmp al, 64; ja
          ...[0x0f, 0xb6, 0xc0], // movzx eax, al
          ...lea(at + 7),
          ...load(CODE + ((at * 13) % (50 * KB))),
          ...ADD_JMP,
        ]),
    ],
    [
      'a branch at every instruction',
      () => repeated(100 * KB, (at) => [0x0f, 0x84, ...dword(((at * 31) % 4096) - 2048)]),
    ],
    [
      'a store to another slot at every instruction',
      () => repeated(100 * KB, (at) => [0x89, 0x84, 0x24, ...dword(at * 4)]),
    ],
    [
      'slots and branches in turn',
      () => repeated(30 * KB, (at) => [0x89, 0x84, 0x24, ...dword(at * 4), 0x74, 0xf0]),
    ],
    ['zeros, which are instructions and entries', () => Buffer.alloc(100 * KB)],
    ['pads', () => Buffer.alloc(100 * KB, 0xcc)],
    ['returns: each the end of code that nothing leads to', () => Buffer.alloc(100 * KB, 0xc3)],
  ])('of a function of %s', (_, make) => {
    // A load in front makes the scan look at the function.
    const bytes = Buffer.concat([Buffer.from([...lea(0), ...load(CODE + 64), ...ADD_JMP]), make()]);
    for (const site of scanImage(imageOf(bytes))) expect(site.rva).toBeLessThan(CODE + bytes.length);
    scanImage(imageOf(bytes, []));
  });

  it('of what the cases of a switch need, where each leads through all the others', () => {
    const cases = 8192;
    const head = [0x3d, ...dword(cases - 1), 0x0f, 0x87]; // cmp eax, cases - 1; ja
    const first = head.length + 4 + 2 + 7 + 7 + ADD_JMP.length;
    const table = first + cases * 2 + 3;
    const code = Buffer.from([
      ...[...head, ...dword(first - head.length - 4), 0x89, 0xc0], // mov eax, eax
      ...[...lea(head.length + 6), ...load(CODE + table), ...ADD_JMP],
      ...Array.from({ length: cases }, () => [0x66, 0x90]).flat(),
      ...[0xc3, 0xcc, 0xcc],
      ...Array.from({ length: cases }, (_, n) => dword(CODE + first + (cases - 1 - n) * 2)).flat(),
    ]);
    const [site] = scanImage(imageOf(code));
    if (!site?.found) throw new Error('there is no switch');
    expect(site.entries).toBe(cases);
    const { liveAtCases } = site;
    const needing = (flags: boolean) => [...liveAtCases.values()].filter((live) => live.flags === flags);
    expect(needing(false).length).toBeGreaterThan(0);
    expect(needing(true).length).toBeGreaterThan(cases / 2);
  });

  it('of calls of every instruction of a long function', () => {
    const callee = 256 * KB;
    const long = Buffer.alloc(8 * KB - 1, 0x90);
    const calls = repeated(callee - 64, (at) => {
      const to = callee + ((at * 7) % (8 * KB));
      return [0xe8, ...dword(to - at - 5 - 64)];
    });
    const unproven = Buffer.from([...load(CODE + 64), ...ADD_JMP, ...Array(48).fill(0xcc)]);
    const code = Buffer.concat([unproven.subarray(0, 64), calls, long, Buffer.from([0xc3])]);
    const functions = [
      { begin: CODE, end: CODE + callee },
      { begin: CODE + callee, end: CODE + code.length },
    ];
    expect(scanImage(imageOf(code, functions, 1 << 20))).toHaveLength(1);
  });

  it('of a function that is too large, and says so', () => {
    const bytes = Buffer.concat([Buffer.from(load(CODE + 64)), Buffer.alloc(600 * KB, 0x90)]);
    for (const functions of ['all', []] as const) {
      const image = imageOf(bytes, functions);
      const recogniser = new SwitchRecogniser(image, FunctionTable.read(image));
      expect(recogniser.prove(CODE)).toMatchObject({ found: false, reason: 'function-too-complex' });
    }
  });

  it('of a large image without .pdata, in which every byte may begin a load', () => {
    const code = repeated(256 * KB, () => load(CODE));
    expect(scanImage(imageOf(code, [], 100 << 20))).toEqual([]);
  });

  it('of a function in thousands of fragments', () => {
    const first = { begin: CODE, end: CODE + 16 };
    const fragments = Array.from({ length: 4_000 }, (_, n) => ({
      begin: CODE + 16 * (n + 1),
      end: CODE + 16 * (n + 2),
      chainedTo: first,
    }));
    const code = repeated(16 * 4_001, () => [...load(CODE), ...Array(9).fill(0x90)]);
    expect(scanImage(imageOf(code, [first, ...fragments]))).toEqual([]);
  });

  it('of as many functions as there are loads', () => {
    const functions = Array.from({ length: 4_000 }, (_, n) => ({
      begin: CODE + 16 * n,
      end: CODE + 16 * (n + 1),
    }));
    const code = repeated(16 * 4_000, () => [...load(CODE), ...ADD_JMP, 0xcc, 0xcc, 0xcc, 0xcc]);
    const sites = scanImage(imageOf(code, functions));
    expect(sites).toHaveLength(4_000);
    for (const site of sites) expect(site).toMatchObject({ found: false, reason: 'base-not-proven' });
  });
});

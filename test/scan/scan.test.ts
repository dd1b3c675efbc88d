import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { scanFile } from '../../src/cli/scan.js';
import { PeImage } from '../../src/nt/pe.js';
import { buildPe, FLAGS, OFFSETS } from '../nt/pe-builder.js';
import { DISPATCH, GUARDED, withTable } from '../switches/cases.js';
import { assemble } from '../switches/listing.js';

const MAIN = 'dist/cli/main.js';
const directory = mkdtempSync(join(tmpdir(), 'memtables-scan-'));
afterAll(() => rmSync(directory, { recursive: true }));

function fileWith(name: string, bytes: Uint8Array): string {
  const path = join(directory, name);
  writeFileSync(path, bytes);
  return path;
}

function scan(path: string, options: { json?: boolean } = {}): string {
  let text = '';
  scanFile(path, options, {
    write: (piece) => {
      text += piece;
    },
  });
  return text;
}

/** Two functions: one with a guard, and one without. */
const listing = assemble(
  `${withTable(`${GUARDED}${DISPATCH}`)}
 .balign 16, 0xcc
g: lea rdx, [rip+image]
unguarded: mov ecx, [rdx+rax*4+table2-image]
 add rcx, rdx
 jmp rcx
case2: ret
 .balign 4, 0xcc
table2: .long 0x7fffffff, case2-image
g_end:`,
  {
    functions: [
      { from: 'f', to: 'end' },
      { from: 'g', to: 'g_end' },
    ],
  },
);
const path = fileWith('two.dll', listing.file);
const rva = (label: string) => `0x${listing.rva(label).toString(16)}`;

describe('scan', () => {
  it('a table for a person, with a header and a summary', () => {
    expect(scan(path)).toBe(`${path}: x86-64 image, 1 KB of code in .text

    load  section  form        table  entries  handler  end of the table
  ------  -------  ---------  ------  -------  -------  ---------------------------------------------
  ${rva('load')}  .text    one-level  ${rva('table')}        5    106 B  proven
  ${rva('unguarded')}  .text    one-level  ${rva('table2')}        -        -  refused: it is not known where the table ends

switch tables in code    2 (2 one-level, 0 two-level)
  end proven             1 (1 one-level, 0 two-level): could be relocated
  refused                1: it is not known where the table ends
entries of a table       median 5, p90 5, p99 5, largest 5
handlers of all          106 bytes
`);
  });

  it('JSON lines for a program: a site each, then the summary', () => {
    const records = scan(path, { json: true })
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line));
    expect(records).toEqual([
      {
        type: 'site',
        file: path,
        rva: rva('load'),
        section: '.text',
        form: 'one-level',
        table: rva('table'),
        tableSection: '.text',
        proven: true,
        entries: 5,
        destination: 'rcx',
        base: 'rdx',
        index: 'rax',
        length: 7,
        back: `0x${(listing.rva('load') + 7).toString(16)}`,
        adjacent: true,
        isBranchTarget: false,
        encoder: 'fused',
        handlerBytes: 106,
      },
      {
        type: 'site',
        file: path,
        rva: rva('unguarded'),
        section: '.text',
        form: 'one-level',
        table: rva('table2'),
        tableSection: '.text',
        proven: false,
        reason: 'bound-not-proven',
      },
      {
        type: 'summary',
        file: path,
        loads: { 'one-level': 2, 'two-level': 0 },
        proven: { 'one-level': 1, 'two-level': 0 },
        refused: { 'bound-not-proven': 1 },
        tooManyEntries: 0,
        notInCode: 0,
        entries: { median: 5, p90: 5, p99: 5, max: 5 },
        handlerBytes: 106,
      },
    ]);
  });

  it('a table outside of code is counted, not listed', () => {
    const source = `f: mov eax, eax${GUARDED}${DISPATCH}
case: inc ebx
default: ret
end: .balign 0x1000
table: .rept 5
 .long case-image
 .endr`;
    const { file } = assemble(source, { sections: [{ name: '.rdata', at: 'table', flags: FLAGS.data }] });
    const text = scan(fileWith('rdata.dll', file));
    expect(text).toContain('switch tables in code    0');
    expect(text).toContain('switch tables elsewhere  1: ');
    expect(text).not.toContain('0x');
  });

  it('an index that may leave the section of its table leaves the table in code', () => {
    const { file } = assemble(withTable(`and eax, 0xfff\n lea rdx, [rip+image]${DISPATCH}`));
    const summary = JSON.parse(
      scan(fileWith('leaves.dll', file), { json: true }).trimEnd().split('\n').at(-1)!,
    );
    expect(summary).toMatchObject({ proven: { 'one-level': 1 }, notInCode: 0 });
  });

  it('an image without a switch, and one without code', () => {
    const quiet = buildPe({
      sections: [{ name: '.text', rva: 0x1000, bytes: Buffer.alloc(64, 0xc3), flags: FLAGS.code }],
    });
    expect(scan(fileWith('quiet.dll', quiet))).toContain(
      'switch tables in code    0 (0 one-level, 0 two-level)',
    );
    const resources = buildPe({ sections: [] });
    expect(scan(fileWith('resources.dll', resources))).toContain('no code');
  });

  it('thousands of tables: one line each, and columns that stay aligned', () => {
    const count = 1500;
    const functions = Array.from({ length: count }, (_, n) => ({ from: `f${n}`, to: `end${n}` }));
    const source = functions
      .map(
        (_, n) => `f${n}: mov eax, eax
 cmp eax, ${n % 7}
 ja default${n}
 lea rdx, [rip+image]
 mov ecx, [rdx+rax*4+table${n}-image]
 add rcx, rdx
 jmp rcx
case${n}: inc ebx
default${n}: ret
 .balign 4, 0xcc
table${n}: .rept ${1 + (n % 7)}
 .long case${n}-image
 .endr
end${n}:`,
      )
      .join('\n');
    const lines = scan(fileWith('many.dll', assemble(source, { functions }).file)).split('\n');
    const sites = lines.filter((line) => line.endsWith('proven'));
    expect(sites).toHaveLength(count);
    expect(new Set(sites.map((line) => line.indexOf('proven'))).size).toBe(1);
    expect(lines.find((line) => line.startsWith('switch tables'))).toContain(`${count} (`);
  });
});

describe('memtables scan, as a process', () => {
  const command = (...parameters: string[]) =>
    spawnSync(process.execPath, [MAIN, 'scan', ...parameters], { encoding: 'utf8' });

  it('prints the result on stdout and exits with 0', () => {
    const { status, stdout, stderr } = command(path);
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    expect(stdout).toBe(scan(path));
    expect(command('--json', path).stdout).toBe(scan(path, { json: true }));
  });

  const wrong = (name: string, bytes: Uint8Array) => () => fileWith(name, bytes);
  it.each([
    ['a file that is not there', () => join(directory, 'absent.dll'), 2, 'FILE_UNREADABLE'],
    [
      'a directory',
      () => {
        const path = join(directory, 'folder');
        mkdirSync(path, { recursive: true });
        return path;
      },
      2,
      'FILE_UNREADABLE',
    ],
    ['a device', () => '/dev/null', 2, 'FILE_UNREADABLE'],
    ['an empty file', wrong('empty.dll', Buffer.alloc(0)), 5, 'IMAGE_INVALID'],
    ['a text', wrong('text.dll', Buffer.from('hello '.repeat(100))), 5, 'IMAGE_INVALID'],
    ['a truncated image', wrong('cut.dll', listing.file.subarray(0, 0x310)), 5, 'IMAGE_INVALID'],
    [
      'a 32-bit image',
      wrong(
        'x86.dll',
        (() => {
          const copy = Buffer.from(listing.file);
          copy.writeUInt16LE(0x14c, OFFSETS.file);
          return copy;
        })(),
      ),
      5,
      'GUEST_UNSUPPORTED',
    ],
  ] as [string, () => string, number, string][])('%s', (_, make, code, error) => {
    const file = make();
    const { status, stdout, stderr } = command(file);
    expect({ status, stdout }).toEqual({ status: code, stdout: '' });
    expect(stderr).toMatch(new RegExp(`^memtables: .*${file}.* \\[${error}\\]\n`));
    expect(stderr).toContain('what to do: ');
    expect(stderr).not.toContain('internal error');
  });

  it('several files: one after the other, and one that is wrong does not stop the others', () => {
    const absent = join(directory, 'absent.dll');
    const { status, stdout, stderr } = command(path, absent, path);
    expect(stdout).toBe(`${scan(path)}\n${scan(path)}`);
    expect(stderr).toContain(absent);
    expect(status).toBe(2);
    const records = command('--json', path, path).stdout.trimEnd().split('\n');
    expect(records.map((line) => JSON.parse(line).file)).toEqual(Array(6).fill(path));
  });

  it.each([
    ['no file', []],
    ['an unknown option', ['--fast', path]],
  ])('%s: exit code 2, and the way to the help', (_, parameters) => {
    const { status, stderr } = command(...parameters);
    expect(status).toBe(2);
    expect(stderr).toContain('error: ');
  });
});

/** How many one-level and two-level loads the real binaries have in code, and how many elsewhere. */
const BINARIES: [name: string, oneLevel: number, twoLevel: number, elsewhere: number][] = [
  ['OpenConsole.exe', 53, 26, 8],
  ['conpty.dll', 0, 1, 8],
  ['winpty-agent.exe', 5, 3, 8],
  ['tree-sitter-c.node', 5, 0, 8],
  ['lmdb.node', 15, 11, 8],
  ['rocksdb.node', 22, 8, 8],
  // Its own code is clang's; the four are of the C runtime that is linked in.
  ['koffi.node', 3, 1, 22],
];
const binary = (name: string) => join('.deps/binaries', name);

describe.each(BINARIES)('real binary %s', (name, oneLevel, twoLevel, elsewhere) => {
  const title = 'every table load is found, and every end proven';
  const expected = { 'one-level': oneLevel, 'two-level': twoLevel };
  if (!existsSync(binary(name))) {
    it.skip(`${title} (no .deps/binaries: run npm run binaries)`);
    return;
  }

  it(title, () => {
    const records = scan(binary(name), { json: true })
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line));
    expect(records.at(-1)).toMatchObject({
      loads: expected,
      proven: expected,
      refused: {},
      notInCode: elsewhere,
    });
    const tooLarge = records.filter(({ entries }) => Number.isInteger(entries) && entries > 256);
    expect(records.at(-1).tooManyEntries).toBe(tooLarge.length);
    for (const record of tooLarge) expect(record).not.toHaveProperty('handlerBytes');
  });

  it('one bit in a thousand bytes of its code changed: it still ends', () => {
    const bytes = Buffer.from(readFileSync(binary(name)));
    const [text] = PeImage.fromFile(bytes).sections;
    const start = 0x400; // where the code begins in a file of this kind
    let state = 1;
    for (let at = start; at < start + text!.virtualSize; at += 1 + (state % 2000)) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      bytes[at] = bytes[at]! ^ (1 << (state >>> 29));
    }
    const records = scan(fileWith(name, bytes), { json: true }).trimEnd().split('\n');
    expect(JSON.parse(records.at(-1)!)).toMatchObject({ type: 'summary' });
  });
});

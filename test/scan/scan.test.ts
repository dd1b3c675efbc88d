import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { scanFiles } from '../../src/cli/scan.js';
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
  scanFiles([path], options, {
    write: (piece: string) => {
      text += piece;
    },
  });
  return text;
}

type Json = Readonly<Record<string, unknown>> & { readonly entries: number };

function records(json: string): Json[] {
  return json
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line));
}

function withoutTime(text: string): string {
  return text.replaceAll(/^time .* s\n/gm, '');
}

/** Two functions: one with a guard, and one that has neither a guard nor a table. */
const listing = assemble(
  `${withTable(`${GUARDED}${DISPATCH}`)}
 .balign 16, 0xcc
g: lea rdx, [rip+image]
unguarded: mov ecx, [rdx+rax*4+table2-image]
 add rcx, rdx
 jmp rcx
case2: ret
 .balign 4, 0xcc
table2: .long 0x7fffffff
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
const PAGE = 0x1000;
const available = PAGE - listing.code.length;
/** Of the handler that replaces the guarded load. */
const bytes = records(scan(path, { json: true }))[0]!.slackBytes as number;

function expectedRecords() {
  return [
    {
      type: 'switch',
      site: rva('load'),
      table: rva('table'),
      entries: 5,
      evidence: 'guard',
      form: 'one-level',
      encoder: expect.any(String),
      slackBytes: bytes,
      refused: null,
    },
    {
      type: 'switch',
      site: rva('unguarded'),
      table: rva('table2'),
      entries: null,
      evidence: 'none',
      form: 'one-level',
      encoder: null,
      slackBytes: null,
      refused: 'bound-not-proven',
    },
    {
      type: 'summary',
      switches: 2,
      twoLevel: 0,
      relocatable: 1,
      refused: { 'bound-not-proven': 1 },
      slackBytes: { available, needed: bytes },
      seconds: expect.any(Number),
    },
  ];
}

describe('scan', () => {
  it('tables for a person: by section and form, what is refused, and whether slack suffices', () => {
    expect(withoutTime(scan(path))).toBe(`${path}: x86-64 image, 1 KB of code in .text

  section  form       switches  end by guard  by neighbour  largest  relocatable  bytes
  -------  ---------  --------  ------------  ------------  -------  -----------  -----
  .text    one-level         2             1             0        5            1${String(bytes).padStart(7)}

  refused  section  table   because
  -------  -------  ------  ------------------------------------
  ${rva('unguarded')}   .text    ${rva('table2')}  it is not known where the table ends

switches            2 (2 one-level, 0 two-level)
  relocatable       1, with handlers of ${bytes} bytes
  refused           1: it is not known where the table ends
slack for handlers  ${available} bytes, enough for all of them
`);
  });

  it('JSON lines for a program: a switch each, then the summary', () => {
    expect(bytes).toBeGreaterThan(0);
    expect(records(scan(path, { json: true }))).toEqual(expectedRecords());
  });

  it('a two-level switch with both of its tables', () => {
    const code = `cmp eax, 7
 ja default
 lea rdx, [rip+image]
byte: movzx eax, byte ptr [rdx+rax+bytes-image]${DISPATCH}`;
    const source = withTable(code, { entries: 2, more: 'bytes: .byte 0, 1, 0, 1, 0, 1, 0, 1' });
    const two = assemble(source);
    const [found, summary] = records(scan(fileWith('two-level.dll', two.file), { json: true }));
    const at = (label: string) => `0x${two.rva(label).toString(16)}`;
    expect(found).toMatchObject({
      form: 'two-level',
      entries: 2,
      byteTable: { site: at('byte'), table: at('bytes'), entries: 8 },
    });
    expect(summary).toMatchObject({ switches: 1, twoLevel: 1, relocatable: 1 });
  });

  it('a table that reads never trap on is no switch to list', () => {
    const source = `f: mov eax, eax${GUARDED}${DISPATCH}
case: inc ebx
default: ret
end: .balign 0x1000
table: .rept 5
 .long case-image
 .endr`;
    const { file } = assemble(source, { sections: [{ name: '.rdata', at: 'table', flags: FLAGS.data }] });
    expect(records(scan(fileWith('rdata.dll', file), { json: true }))).toMatchObject([
      { type: 'summary', switches: 0 },
    ]);
  });

  it('a table with an end that is a guess gets a handler with a guard', () => {
    const { file } = assemble(
      withTable(`and eax, 0xfff\n lea rdx, [rip+image]${DISPATCH}`).replace(/other: .*/, ''),
    );
    const [found] = records(scan(fileWith('leaves.dll', file), { json: true }));
    expect(found).toMatchObject({ entries: 5, evidence: 'none', encoder: 'guarded', refused: null });
  });

  it.each([
    ['PAGE', FLAGS.code, 'pageable'],
    ['INIT', FLAGS.code, 'initialisation-code'],
  ])('code in %s is refused for where it is', (name, flags, reason) => {
    const source = `g: ret\n.balign 0x1000\n${withTable(`${GUARDED}${DISPATCH}`)}`;
    const { file } = assemble(source, { sections: [{ name, at: 'f', flags }] });
    const [found] = records(scan(fileWith(`${name}.dll`, file), { json: true }));
    expect(found).toMatchObject({ entries: 5, evidence: 'guard', encoder: null, refused: reason });
  });

  it.each([
    ['OTHER', PAGE - 1],
    ['PAGE', 0],
  ])('what is left of the last page of %s is %i bytes of slack', (name, available) => {
    const source = 'f: ret\nend: .balign 0x1000\ng: ret';
    const { file } = assemble(source, { sections: [{ name, at: 'g', flags: FLAGS.code }] });
    const [summary] = records(scan(fileWith('slack.dll', file), { json: true }));
    expect(summary).toMatchObject({ slackBytes: { available, needed: 0 } });
  });

  it('an image without a switch, and one without code', () => {
    const quiet = buildPe({
      sections: [{ name: '.text', rva: 0x1000, bytes: Buffer.alloc(64, 0xc3), flags: FLAGS.code }],
    });
    expect(scan(fileWith('quiet.dll', quiet))).toContain('switches            0 (0 one-level, 0 two-level)');
    const resources = buildPe({ sections: [] });
    expect(scan(fileWith('resources.dll', resources))).toContain('no code');
  });

  it('thousands of refused loads: some of them, and how many more', () => {
    const count = 1500;
    const functions = Array.from({ length: count }, (_, n) => ({ from: `f${n}`, to: `end${n}` }));
    const source = functions
      .map(
        (_, n) => `f${n}: lea rdx, [rip+image]
 mov ecx, [rdx+rax*4+table${n}-image]
 add rcx, rdx
 jmp rcx
 .balign 4, 0xcc
table${n}: .long 0x7fffffff
end${n}:`,
      )
      .join('\n');
    const lines = scan(fileWith('many.dll', assemble(source, { functions }).file)).split('\n');
    const refused = lines.filter((line) => line.endsWith('ends') && line.startsWith('  0x'));
    expect(refused).toHaveLength(20);
    expect(lines).toContain('  and 1480 more');
    expect(lines).toContain('  refused           1500: it is not known where the table ends');
  });
});

describe('memtables scan, as a process', () => {
  const command = (...parameters: string[]) =>
    spawnSync(process.execPath, [MAIN, 'scan', ...parameters], { encoding: 'utf8' });

  it('prints the result on stdout and exits with 0', () => {
    const { status, stdout, stderr } = command(path);
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    expect(withoutTime(stdout)).toBe(withoutTime(scan(path)));
    const json = command('--json', path).stdout;
    expect(records(json)).toEqual(expectedRecords());
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
    expect(withoutTime(stdout)).toBe(withoutTime(`${scan(path)}\n${scan(path)}`));
    expect(stderr).toContain(absent);
    expect(status).toBe(2);
    const lines = records(command('--json', path, path).stdout);
    expect(lines).toEqual(
      [...expectedRecords(), ...expectedRecords()].map((line) => ({ ...line, file: path })),
    );
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

/** How many one-level and two-level switches the real binaries have. */
const BINARIES: [name: string, oneLevel: number, twoLevel: number][] = [
  ['OpenConsole.exe', 53, 26],
  ['conpty.dll', 0, 1],
  ['winpty-agent.exe', 5, 3],
  ['tree-sitter-c.node', 5, 0],
  ['lmdb.node', 15, 11],
  ['rocksdb.node', 22, 8],
  // Its own code is clang's, with tables that are none of ours; these are of the C runtime that is linked in.
  ['koffi.node', 3, 1],
];
const binary = (name: string) => join('.deps/binaries', name);

describe.each(BINARIES)('real binary %s', (name, oneLevel, twoLevel) => {
  const title = 'every switch is found, and every end proven by its guard';
  if (!existsSync(binary(name))) {
    it.skip(`${title} (no .deps/binaries: run npm run binaries)`);
    return;
  }

  it(title, () => {
    const lines = records(scan(binary(name), { json: true }));
    const summary = lines.pop()!;
    expect(summary).toMatchObject({ switches: oneLevel + twoLevel, twoLevel });
    for (const { evidence } of lines) expect(evidence).toBe('guard');
    expect(summary.relocatable).toBe(lines.length);
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
    expect(records(scan(fileWith(name, bytes), { json: true })).at(-1)).toMatchObject({ type: 'summary' });
  });
});

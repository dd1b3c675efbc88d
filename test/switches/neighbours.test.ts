import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage } from '../../src/nt/pe.js';
import type { Analysis } from '../../src/switches/analysis.js';
import { functionAt } from '../../src/switches/functions.js';
import { analyse } from '../../src/switches/interpreter.js';
import { dwordTableEnd } from '../../src/switches/neighbours.js';
import { scanImage } from '../../src/switches/scan.js';
import { type FoundSwitch, SwitchRecogniser } from '../../src/switches/table.js';
import { type Instruction, Mnemonic } from '../../src/x86/instruction.js';
import { DISPATCH, withTable } from './cases.js';
import { assemble, prove } from './listing.js';

/** The index is whatever the caller gives. */
const UNGUARDED = `
      lea rdx, [rip+image]${DISPATCH}`;

/** What lies behind a table of 5 entries, in the place of more that could be some. */
const behind = (what: string) => withTable(UNGUARDED).replace(/other: .*/, `other: ${what}`);

describe('a table that no guard bounds', () => {
  it.each([
    ['a dword that leads out of the function', behind('.long 0x7fffffff')],
    ['the end of the function', behind('')],
    ['code', behind('ret\n.balign 8\n').replace('case: inc ebx', 'case: jmp other')],
    [
      'another table',
      withTable(`test r8d, r8d
      jne f2${UNGUARDED}
f2:   cmp r9d, 2
      ja default
      mov r9d, r9d
      lea r10, [rip+image]
      mov r11d, [r10+r9*4+other-image]
      add r11, r10
      jmp r11`),
    ],
  ])('ends with %s', (_, source) => {
    expect(prove(source)).toMatchObject({ found: true, evidence: 'neighbour', entries: 5 });
  });

  it('has the entries of cases that cannot happen', () => {
    const source = behind('.long 0, default-image\n.long 0x7fffffff');
    expect(prove(source)).toMatchObject({ evidence: 'neighbour', entries: 7 });
  });

  it('begins behind padding that seems to be an instruction with its first bytes', () => {
    const source = `f: movzx eax, byte ptr [rcx]${UNGUARDED}
case: ret
      .fill 3, 1, 0x66
      .byte 0x48, 0x81
table: .rept 5
      .long case-image
      .endr
      .byte 0xcc, 0xcc, 0xcc, 0xcc
end:`;
    const { image, rva } = assemble(source, { functions: [] });
    const site = new SwitchRecogniser(image, FunctionTable.read(image)).prove(rva('load'));
    expect(site).toMatchObject({ found: true, evidence: 'neighbour', entries: 5 });
  });

  it.each([
    ['into an instruction', behind('.long case+1-image')],
    ['to other code, where one of its cases may be', `${behind('.long stranger-image')}\nstranger: ret`],
    [
      'to code, though it seems to be an instruction itself',
      behind('.long stranger-image\nstranger: ret').replace('case: inc ebx', 'case: jmp other'),
    ],
  ])('is a guess where the next dword leads %s', (_, source) => {
    expect(prove(source)).toMatchObject({ found: true, evidence: 'none', entries: 5 });
  });

  it('is a guess where a negative index may reach a case in front of it', () => {
    const source = behind('int3')
      .replace('lea rdx', 'movsxd rax, eax\n lea rdx')
      .replace('table: .rept', '.long case-image\ntable: .rept');
    expect(prove(source)).toMatchObject({ evidence: 'none', entries: 5 });
    const first = source.replace('.long case-image\n', '.long 0xcccccccc\n');
    expect(prove(first)).toMatchObject({ evidence: 'neighbour', entries: 5 });
  });

  it('is none where its first entry is none', () => {
    const source = behind('').replace('table: .rept', 'table: .long 0x7fffffff\n.rept');
    expect(prove(source)).toMatchObject({ found: false, reason: 'bound-not-proven' });
  });

  it('is none where it has no case at all', () => {
    const source = behind('').replace('.long case-image', '.long 0');
    expect(prove(source)).toMatchObject({ found: false, reason: 'bound-not-proven' });
  });

  it('ends before what an index of one byte could reach, which is no guard', () => {
    const source = behind('int3').replace('mov eax, eax', 'movzx eax, cl');
    expect(prove(source)).toMatchObject({ evidence: 'neighbour', entries: 5 });
  });

  it('keeps what is known of the base for the loads that its cases lead to', () => {
    const code = `
      mov r9d, r9d
      lea rdx, [rip+image]${DISPATCH}
second: cmp r9d, 2
      ja default
inner: mov r8d, [rdx+r9*4+other-image]
      add r8, rdx
      jmp r8`;
    const source = withTable(code).replace('.long case-image', '.long second-image');
    expect(prove(source)).toMatchObject({ evidence: 'neighbour', entries: 5 });
    expect(prove(source, { load: 'inner' })).toMatchObject({ evidence: 'guard', entries: 3 });
  });
});

const BINARIES = ['OpenConsole.exe', 'winpty-agent.exe', 'tree-sitter-c.node', 'lmdb.node', 'rocksdb.node'];
const paths = BINARIES.map((name) => join('.deps/binaries', name));
const title = 'real tables that a guard bounds';
if (!paths.every(existsSync)) {
  it.skip(`${title} (no .deps/binaries: run npm run binaries)`);
} else {
  describe(title, () => {
    const files = paths.map((path) => readFileSync(path));
    const images = files.map((file) => PeImage.fromFile(file));
    const guarded = images.map((image) => scanImage(image).filter(isGuarded));
    const analyses = images.map((image, at) => analysesOf(image, guarded[at]!));

    it('end where their neighbours say, in 99.9 of 100 cases', () => {
      const ends = guarded.flatMap((switches, at) =>
        switches.map(({ rva, entries }, n) => {
          const analysis = analyses[at]![n]!;
          const end = dwordTableEnd(images[at]!, analysis, analysis.loads.get(rva)!);
          return end.definite && end.entries === entries;
        }),
      );
      expect(ends.length).toBe(148);
      expect(ends.filter((same) => same).length / ends.length).toBeGreaterThanOrEqual(0.999);
    });

    it('are never taken for shorter when all guards are taken out of the code', () => {
      const found = { neighbour: 0, same: 0, guess: 0 };
      images.forEach((_, at) => {
        const file = Buffer.from(files[at]!);
        const known = new Map<number, FoundSwitch>();
        guarded[at]!.forEach((site, n) => {
          const guard = guardOf(analyses[at]![n]!, site);
          if (guard === undefined) return;
          known.set(site.rva, site);
          const offset = fileOffset(file, Number(guard.ip));
          file.fill(0x90, offset, offset + guard.length);
        });
        for (const site of scanImage(PeImage.fromFile(file))) {
          const before = known.get(site.rva);
          if (before === undefined) continue;
          const where = `${BINARIES[at]} ${site.rva.toString(16)}`;
          if (!site.found) throw new Error(`${where} is refused: ${site.reason}`);
          if (site.evidence === 'none') found.guess++;
          else {
            found.neighbour++;
            expect(site.entries, where).toBeGreaterThanOrEqual(before.entries);
            const bytes = site.byteTable?.entries ?? 0;
            expect(bytes, where).toBeGreaterThanOrEqual(before.byteTable?.entries ?? 0);
            if (site.entries === before.entries) found.same++;
          }
        }
      });
      expect(found.neighbour).toBeGreaterThan(85);
      expect(found.same / found.neighbour).toBeGreaterThanOrEqual(0.999);
      expect(found.guess).toBeLessThan(50);
    });
  });
}

function isGuarded(site: { readonly found: boolean }): site is FoundSwitch {
  return site.found && (site as FoundSwitch).evidence === 'guard';
}

function analysesOf(image: PeImage, switches: readonly FoundSwitch[]): Analysis[] {
  const functions = FunctionTable.read(image);
  const known = new Map<number, Analysis>();
  return switches.map(({ rva }) => {
    const code = functionAt(image, functions, rva)!;
    const key = code.ranges[0]!.begin;
    const analysis = known.get(key) ?? analyse(image, code);
    known.set(key, analysis);
    return analysis;
  });
}

/** The `ja` of the usual guard: a compare with the last index stands before it, and the load behind. */
function guardOf(
  { instructions }: Analysis,
  { rva, entries, byteTable }: FoundSwitch,
): Instruction | undefined {
  const last = (byteTable?.entries ?? entries) - 1;
  const before = [...instructions.keys()].filter((at) => at < (byteTable?.rva ?? rva) && at > rva - 300);
  before.sort((a, b) => b - a);
  for (const [n, at] of before.entries()) {
    const [jump, compare] = [instructions.get(at)!, instructions.get(before[n + 1]!)];
    const limit = compare?.mnemonic === Mnemonic.Cmp ? compare.operands[1] : undefined;
    const isGuard = jump.mnemonic === Mnemonic.Ja && limit?.kind === 'immediate';
    if (isGuard && Number(limit.value) === last) return jump;
  }
  return undefined;
}

function fileOffset(file: Buffer, rva: number): number {
  const pe = file.readUInt32LE(0x3c);
  const headers = pe + 24 + file.readUInt16LE(pe + 20);
  for (let n = 0; n < file.readUInt16LE(pe + 6); n++) {
    const header = headers + n * 40;
    const start = file.readUInt32LE(header + 12);
    const offset = rva - start;
    if (offset >= 0 && offset < file.readUInt32LE(header + 8)) return file.readUInt32LE(header + 20) + offset;
  }
  throw new Error(`no section has ${rva.toString(16)}`);
}

import { describe, expect, it } from 'vitest';
import type { FoundSwitch } from '../../src/switches/table.js';
import { SwitchRecogniser } from '../../src/switches/table.js';
import { GPR_NAMES, type GprName } from '../../src/x86/registers.js';
import { DISPATCH, type Ending, GUARDED, withTable } from './cases.js';
import { assemble, type ListingOptions, prove } from './listing.js';

interface Golden {
  readonly hazard: string;
  readonly code: string;
  readonly ending?: Ending;
  readonly options?: ListingOptions & { readonly load?: string };
  /** Default: 5 entries, one level. */
  readonly expected?: Partial<FoundSwitch>;
}

const GUARDS: Golden[] = [
  { hazard: 'cmp, ja to the default', code: `${GUARDED}${DISPATCH}` },
  {
    hazard: 'cmp, jae to the default',
    code: `cmp eax, 5
      jae default
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'cmp, jbe to the load',
    code: `lea rdx, [rip+image]
      cmp eax, 4
      jbe load
      ret${DISPATCH}`,
  },
  {
    hazard: 'cmp, jb to the load',
    code: `lea rdx, [rip+image]
      cmp eax, 5
      jb load
      ret${DISPATCH}`,
  },
  {
    hazard: 'a guard of 64 bits',
    code: `lea rdx, [rip+image]
      cmp rax, 4
      ja default${DISPATCH}`,
  },
  {
    hazard: 'the guard on a copy made before',
    code: `mov eax, r9d
      cmp r9d, 4
      ja default
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'a copy made after the guard',
    code: `cmp r9d, 4
      ja default
      mov eax, r9d
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'a limit in a register',
    code: `mov r8d, 4
      cmp eax, r8d
      ja default
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'a signed compare of a number known to be not negative',
    code: `movzx eax, cl
      cmp eax, 4
      jg default
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'a test of the sign, then a signed compare',
    code: `test eax, eax
      js default
      cmp eax, 4
      jg default
      lea rdx, [rip+image]
      mov eax, eax${DISPATCH}`,
  },
  {
    hazard: 'two guards, the stricter one last',
    code: `cmp eax, 20
      ja default
      cmp eax, 4
      ja default
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'and with a mask instead of a guard',
    code: `and eax, 7
      lea rdx, [rip+image]${DISPATCH}`,
    ending: { entries: 8 },
    expected: { entries: 8 },
  },
  {
    hazard: 'a zero test of the bits above',
    code: `test eax, 0xfffffff8
      jne default
      mov eax, eax
      lea rdx, [rip+image]${DISPATCH}`,
    ending: { entries: 8 },
    expected: { entries: 8 },
  },
  {
    hazard: 'shr as the bound',
    code: `shr eax, 29
      lea rdx, [rip+image]${DISPATCH}`,
    ending: { entries: 8 },
    expected: { entries: 8 },
  },
  {
    hazard: 'the type of a movzx byte index',
    code: `movzx eax, cl
      lea rdx, [rip+image]${DISPATCH}`,
    ending: { entries: 256 },
    expected: { entries: 256 },
  },
  {
    hazard: 'a guard of 8 bits and the movzx of the same byte',
    code: `cmp cl, 4
      ja default
      movzx eax, cl
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'a cmov that clamps the index',
    code: `mov ecx, 4
      cmp eax, ecx
      cmova eax, ecx
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'an index that an equal compare makes a constant',
    code: `cmp eax, 3
      jne default
      lea rdx, [rip+image]${DISPATCH}`,
    expected: { entries: 4 },
  },
];

const MOVES: Golden[] = [
  {
    hazard: 'the bias of the first case, by sub',
    code: `sub eax, 0x10
      cmp eax, 4
      ja default
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'the bias of the first case, by lea',
    code: `lea eax, [rcx-0x10]
      cmp eax, 4
      ja default
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'the bias of the first case, by dec',
    code: `dec eax
      cmp eax, 4
      ja default
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'movsxd of a guarded index',
    code: `cmp ecx, 4
      ja default
      movsxd rax, ecx
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'cdqe of a guarded index',
    code: `cmp eax, 4
      ja default
      cdqe
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'zero extension by a mov of 32 bits after the guard',
    code: `cmp ecx, 4
      ja default
      mov eax, ecx
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'an index spilled to the stack after the guard',
    code: `sub rsp, 0x28
      cmp ecx, 4
      ja default
      mov [rsp+0x20], ecx
      xor ecx, ecx
      mov eax, [rsp+0x20]
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'a stack slot that is itself guarded',
    code: `sub rsp, 0x28
      mov [rsp+0x20], ecx
      cmp dword ptr [rsp+0x20], 4
      ja default
      movsxd rax, dword ptr [rsp+0x20]
      lea rdx, [rip+image]${DISPATCH}`,
  },
  {
    hazard: 'ImageBase spilled to the stack',
    code: `sub rsp, 0x28
      lea rdx, [rip+image]
      mov [rsp+0x20], rdx
      xor edx, edx
      cmp eax, 4
      ja default
      mov rdx, [rsp+0x20]${DISPATCH}`,
  },
  {
    hazard: 'lea of ImageBase hoisted over a call, in a register that calls keep',
    code: `sub rsp, 0x28
      lea rdi, [rip+image]
      call callee
      mov eax, eax
      cmp eax, 4
      ja default
load: mov ecx, [rdi+rax*4+table-image]
      add rcx, rdi
      jmp rcx`,
    ending: { more: 'callee: ret' },
  },
  {
    hazard: 'a guarded index kept over a call, in a register that calls keep',
    code: `sub rsp, 0x28
      cmp ecx, 4
      ja default
      mov edi, ecx
      call callee
      lea rdx, [rip+image]
      mov eax, edi${DISPATCH}`,
    ending: { more: 'callee: ret' },
  },
  {
    hazard: 'lea of ImageBase hoisted out of a loop',
    code: `lea rdx, [rip+image]
      mov r9d, 10
again: mov eax, [r8]
      cmp eax, 4
      ja next
load: mov ecx, [rdx+rax*4+table-image]
      add rcx, rdx
      jmp rcx
next: dec r9d
      jne again
      ret`,
  },
];

const FORMS: Golden[] = [
  {
    hazard: 'dst == idx',
    code: `${GUARDED}
load: mov eax, [rdx+rax*4+table-image]
      add rax, rdx
      jmp rax`,
    expected: { destination: 'rax', index: 'rax' },
  },
  {
    hazard: 'dst == base, with a second lea',
    code: `${GUARDED}
load: mov edx, [rdx+rax*4+table-image]
      lea rcx, [rip+image]
      add rdx, rcx
      jmp rdx`,
    expected: { destination: 'rdx', base: 'rdx', adjacent: false },
  },
  {
    hazard: 'add with ImageBase as its destination',
    code: `${GUARDED}
load: mov ecx, [rdx+rax*4+table-image]
      add rdx, rcx
      jmp rdx`,
    expected: { adjacent: true },
  },
  {
    hazard: 'load, add and jmp apart',
    code: `${GUARDED}
load: mov ecx, [rdx+rax*4+table-image]
      mov r8d, 1
      add rcx, rdx
      xor r9d, r9d
      jmp rcx`,
    expected: { adjacent: false },
  },
  {
    hazard: 'a load that is a branch target',
    code: `lea rdx, [rip+image]
      cmp eax, 4
      jbe load
      xor eax, eax${DISPATCH}`,
    expected: { isBranchTarget: true },
  },
  {
    hazard: 'the jump that a retpoline kernel has rewritten',
    code: `${GUARDED}
load: mov ecx, [rdx+rax*4+table-image]
      add rcx, rdx
      jmp thunk
      int3`,
    ending: { more: 'f_end: thunk: jmp rcx' },
    options: { functions: [{ from: 'f', to: 'f_end' }] },
    expected: { jmp: expect.objectContaining({ retpoline: true }) },
  },
  {
    hazard: 'a call that does not return before the table',
    code: `${GUARDED}${DISPATCH}
      call callee`,
    ending: { more: 'callee: ret\n call callee' },
  },
];

const TWO_LEVEL = `
      mov ecx, ecx
      cmp ecx, 19
      ja default
      lea rdx, [rip+image]
      movzx eax, byte ptr [rdx+rcx+bytes-image]${DISPATCH}`;
const BYTES = `bytes: .rept 5
      .byte 0, 1, 2, 3
      .endr`;

function expectProven({ code, ending, options, expected }: Golden): void {
  const site = prove(withTable(code, ending), options);
  if (!site.found) throw new Error(`refused: ${site.reason}`);
  expect(site).toMatchObject({
    found: true,
    form: 'one-level',
    entries: 5,
    ...expected,
  });
}

describe('a table whose end is proven', () => {
  describe.each([
    ['guards', GUARDS],
    ['moves of index and base', MOVES],
    ['forms of load and jump', FORMS],
  ])('%s', (_, cases) => {
    it.each(cases)('$hazard', expectProven);
  });

  it('any base, index and destination register', () => {
    const usable = GPR_NAMES.filter((name) => name !== 'rsp');
    const sites: { base: GprName; index: GprName; destination: GprName }[] = [];
    let turn = 0;
    for (const base of usable) {
      for (const index of usable) {
        const destination = usable[turn++ % usable.length]!;
        if (base !== index && destination !== base) sites.push({ base, index, destination });
      }
    }
    const dword = (name: GprName) => (/^r\d/.test(name) ? `${name}d` : name.replace('r', 'e'));
    const listing = assemble(
      sites
        .map(({ base, index, destination }, n) => {
          const entries = 1 + (n % 9);
          return `
      f${n}: mov ${dword(index)}, ${dword(index)}
      cmp ${dword(index)}, ${entries - 1}
      ja default${n}
      lea ${base}, [rip+image]
      load${n}: mov ${dword(destination)}, [${base}+${index}*4+table${n}-image]
      add ${destination}, ${base}
      jmp ${destination}
      case${n}: inc dword ptr [rsp+8]
      default${n}: ret
      table${n}: .rept ${entries}
      .long case${n}-image
      .endr
      end${n}:`;
        })
        .join('\n'),
      { functions: sites.map((_, n) => ({ from: `f${n}`, to: `end${n}` })) },
    );
    const recogniser = new SwitchRecogniser(listing.image, listing.functions);
    for (const [n, registers] of sites.entries()) {
      expect(recogniser.prove(listing.rva(`load${n}`)), JSON.stringify(registers)).toMatchObject({
        found: true,
        ...registers,
        entries: 1 + (n % 9),
        table: listing.rva(`table${n}`),
      });
    }
    expect(sites.length).toBeGreaterThan(180);
  });

  it('carries the entries, and the places of load, add and jmp', () => {
    const source = `${withTable(`${GUARDED}${DISPATCH}`)}`;
    const listing = assemble(source);
    const load = listing.rva('load');
    expect(new SwitchRecogniser(listing.image, listing.functions).prove(load)).toEqual({
      found: true,
      form: 'one-level',
      rva: load,
      length: 7,
      isBranchTarget: false,
      table: listing.rva('table'),
      entries: 5,
      values: Array(5).fill(listing.rva('case')),
      destination: 'rcx',
      base: 'rdx',
      index: 'rax',
      baseIsImageBase: true,
      byteTable: undefined,
      back: load + 7,
      add: {
        rva: load + 7,
        length: 3,
        isBranchTarget: false,
        bytes: Uint8Array.of(0x48, 0x01, 0xd1),
      },
      jmp: { rva: load + 10, length: 2, isBranchTarget: false, retpoline: false },
      adjacent: true,
      evidence: 'guard',
      liveAtCases: expect.any(Map),
    });
  });
});

describe('two-level switches', () => {
  it('the largest byte bounds the dword table', () => {
    const site = prove(withTable(TWO_LEVEL, { entries: 4, more: BYTES }));
    expect(site).toMatchObject({
      found: true,
      form: 'two-level',
      entries: 4,
      byteTable: { entries: 20, destination: 'rax', base: 'rdx', index: 'rcx', length: 8 },
    });
  });

  it('the byte table behind its dword table', () => {
    const source = withTable(TWO_LEVEL, { entries: 4 }).replace('other:', `${BYTES}\nother:`);
    expect(prove(source)).toMatchObject({ found: true, entries: 4, byteTable: { entries: 20 } });
  });

  it('index and base the other way round in the byte load', () => {
    const code = TWO_LEVEL.replace('[rdx+rcx+bytes', '[rcx+rdx+bytes');
    const site = prove(withTable(code, { entries: 4, more: BYTES }));
    expect(site).toMatchObject({ entries: 4, byteTable: { base: 'rdx', index: 'rcx' } });
  });

  it('a byte table read by two loads', () => {
    const code = `test r9d, r9d
      jne f2${TWO_LEVEL}
f2:   mov ecx, ecx
      cmp ecx, 19
      ja default
      lea r8, [rip+image]
      movzx eax, byte ptr [r8+rcx+bytes-image]
load2: mov eax, [r8+rax*4+table-image]
      add rax, r8
      jmp rax`;
    const source = withTable(code, { entries: 4, more: BYTES });
    expect(prove(source)).toMatchObject({ form: 'two-level', entries: 4 });
    expect(prove(source, { load: 'load2' })).toMatchObject({ form: 'two-level', entries: 4 });
  });

  describe('the byte load', () => {
    const LABELLED = TWO_LEVEL.replace('movzx', 'first: movzx');
    const proveBytes = (code: string, more = BYTES) =>
      prove(withTable(code, { entries: 4, more }), { load: 'first' });

    it('stands for the switch that it is the first load of', () => {
      const listing = assemble(withTable(LABELLED, { entries: 4, more: BYTES }));
      const recogniser = new SwitchRecogniser(listing.image, listing.functions);
      const site = recogniser.prove(listing.rva('first'));
      expect(site).toMatchObject({
        found: true,
        rva: listing.rva('load'),
        byteTable: { rva: listing.rva('first'), entries: 20 },
      });
      expect(site).toEqual(recogniser.prove(listing.rva('load')));
      if (!site.found) return;
      expect(site.byteTable!.values).toEqual([...listing.image.read(listing.rva('bytes'), 20)]);
      expect(recogniser.switchesAround(listing.rva('first'))).toEqual([site]);
    });

    it.each([
      ['base-not-proven', 'the base is another', LABELLED.replace('rip+image', 'rip+default')],
      ['not-a-switch', 'no dword is loaded', LABELLED.replace(DISPATCH, '\nret')],
      [
        'destination-not-32-bit',
        'all 64 bits are its destination',
        LABELLED.replace('movzx eax', 'movzx rax'),
      ],
      [
        'byte-not-an-index',
        'some bytes do not reach the dword load',
        LABELLED.replace('load: mov', 'cmp eax, 2\n ja default\nload: mov'),
      ],
      [
        'several-switches',
        'two switches use the byte',
        `${LABELLED.replace('load: mov', 'test r8d, r8d\n jne second\nload: mov')}
second: mov r9d, [rdx+rax*4+table-image]
      add r9, rdx
      jmp r9`,
      ],
    ])('%s: %s', (reason, _, code) => {
      expect(proveBytes(code)).toMatchObject({ found: false, reason, form: 'two-level' });
    });

    it('table-overlaps-code: the index reaches into code', () => {
      const more = `jmp over
bytes: .fill 16, 1, 3
over: add [rax], al
      add [rax], al`;
      expect(proveBytes(LABELLED, more)).toMatchObject({ found: false, reason: 'table-overlaps-code' });
    });

    it('is refused for what its switch is refused for', () => {
      const source = withTable(LABELLED, { entries: 4, more: BYTES });
      const wrong = source.replace('.long case-image', '.long case+1-image');
      expect(prove(wrong, { load: 'first' })).toMatchObject({
        found: false,
        reason: 'entry-not-an-instruction',
      });
    });
  });

  it.each([
    ['behind its dwords', (table: string) => table.replace('other:', `${BYTES}\nother: ret\n`)],
    ['before them', (table: string) => table.replace('table:', `${BYTES}\n.balign 4, 0xcc\ntable:`)],
  ])('without a guard, the byte table %s ends where bytes are no indices any more', (_, withBytes) => {
    const code = TWO_LEVEL.replace('ja default', 'nop').replace('movzx', 'first: movzx');
    const source = withBytes(withTable(code, { entries: 4 })).replace(/other: .*/, 'other: int3');
    const expected = { found: true, evidence: 'neighbour', entries: 4, byteTable: { entries: 20 } };
    expect(prove(source)).toMatchObject(expected);
    expect(prove(source, { load: 'first' })).toMatchObject(expected);
  });

  describe('without a guard of the byte load', () => {
    const code = TWO_LEVEL.replace('ja default', 'nop').replace('movzx', 'first: movzx');
    const bytes = (source: string) => source.replace('table:', `${BYTES}\n.balign 4, 0xcc\ntable:`);

    it('the byte load stays where only a guard of the dword load bounds anything', () => {
      const guarded = code.replace('load: mov', 'cmp eax, 3\n ja default\nload: mov');
      const source = bytes(withTable(guarded, { entries: 4 })).replace(
        /other: .*/,
        'other: .long case+1-image',
      );
      expect(prove(source)).toMatchObject({
        ...{ found: true, evidence: 'guard', entries: 4 },
        byteTable: { refused: 'bound-not-proven' },
      });
      expect(prove(source, { load: 'first' })).toMatchObject({ found: false, reason: 'bound-not-proven' });
    });

    it('a negative index may reach bytes in front of those that are known', () => {
      const signed = code.replace('first:', 'movsxd rcx, ecx\nfirst:');
      const source = bytes(withTable(signed, { entries: 4 })).replace(/other: .*/, 'other: int3');
      const site = prove(source, { load: 'first' });
      expect(site).toMatchObject({ found: true, evidence: 'none', entries: 4, byteTable: { entries: 20 } });
    });

    it('the byte load stays where not even its first byte is an index', () => {
      const source = bytes(withTable(code, { entries: 4 })).replace(/other: .*/, 'other: .long case+1-image');
      const site = prove(source.replace('.rept 5', '.byte 0xcc\n.rept 5'));
      expect(site).toMatchObject({
        evidence: 'none',
        byteTable: { entries: 0, refused: 'bound-not-proven' },
      });
    });

    it('both tables may be guesses', () => {
      const source = bytes(withTable(code, { entries: 4 })).replace(/other: .*/, 'other: .long case+1-image');
      const expected = { found: true, evidence: 'none', entries: 4, byteTable: { entries: 20 } };
      for (const load of ['load', 'first']) {
        const site = prove(source, { load });
        expect(site).toMatchObject(expected);
        expect(site.found && site.byteTable!.refused).toBeUndefined();
      }
    });
  });

  it('a byte table in a writable section bounds nothing', () => {
    const source = `${withTable(TWO_LEVEL, { entries: 4 })}\n.balign 0x1000\ndata: ${BYTES}`;
    const sections = (flags: number) => [{ name: '.data', at: 'data', flags }];
    expect(prove(source, { sections: sections(0x40000040) })).toMatchObject({
      evidence: 'guard',
      entries: 4,
    });
    expect(prove(source, { sections: sections(0xc0000040) })).toMatchObject({
      form: 'one-level',
      evidence: 'neighbour',
    });
  });
});

describe('several tables', () => {
  const second = `
f2:   mov r8d, r8d
      cmp r8d, 2
      ja default
      lea r9, [rip+image]
load2: mov r10d, [r9+r8*4+other-image]
      add r10, r9
      jmp r10`;

  it('back to back, each with its own end', () => {
    const source = withTable(`test ebx, ebx\n jne f2${GUARDED}${DISPATCH}${second}`);
    expect(prove(source)).toMatchObject({ found: true, entries: 5 });
    expect(prove(source, { load: 'load2' })).toMatchObject({ found: true, entries: 3 });
  });

  it('one table read by two loads', () => {
    const source = withTable(
      `test ebx, ebx\n jne f2${GUARDED}${DISPATCH}${second.replace('other', 'table').replace('8d, 2', '8d, 4')}`,
    );
    expect(prove(source)).toMatchObject({ found: true, entries: 5 });
    expect(prove(source, { load: 'load2' })).toMatchObject({ found: true, entries: 5 });
  });

  it('a switch in a case of another, on the index that the first one has guarded', () => {
    const source = withTable(`${GUARDED}${DISPATCH}
case2: lea r9, [rip+image]
load2: mov r10d, [r9+rax*4+table2-image]
      add r10, r9
      jmp r10`)
      .replace('.rept 5', '.long case2-image\n.rept 4')
      .replace(
        'other:',
        'table2: .long case-image, case-image, default-image, default-image, default-image\nother:',
      );
    expect(prove(source)).toMatchObject({ found: true, entries: 5 });
    expect(prove(source, { load: 'load2' })).toMatchObject({ found: true, entries: 5 });
  });

  it('an entry of 0, for a case that cannot happen', () => {
    const source = withTable(`${GUARDED}${DISPATCH}`, { entries: 4 }).replace('table:', 'table: .long 0\n');
    const site = prove(source);
    expect(site).toMatchObject({ found: true, entries: 5 });
    expect(site.found && site.values[0]).toBe(0);
  });
});

describe('where functions begin and end', () => {
  it('a leaf function without .pdata', () => {
    expect(prove(withTable(`${GUARDED}${DISPATCH}`), { functions: [] })).toMatchObject({
      found: true,
      entries: 5,
    });
  });

  it('two leaf functions in one gap, the first with a table at an aligned place', () => {
    const leaf = (n: number) =>
      withTable(`${GUARDED}${DISPATCH}`, { more: '.balign 16, 0xcc' }).replaceAll(
        /\b(f|case|default|table|other|end|load)\b/g,
        `$1${n}`,
      );
    const source = `${leaf(1)}\n.balign 16, 0xcc\n${leaf(2)}`;
    for (const load of ['load1', 'load2']) {
      expect(prove(source, { functions: [], load })).toMatchObject({ found: true, entries: 5 });
    }
  });

  it('a gap between functions that have .pdata', () => {
    const source = `before: push rbx
      pop rbx
      ret
before_end: .balign 16, 0xcc
${withTable(`${GUARDED}${DISPATCH}`)}
      .balign 16, 0xcc
after: ret
after_end:`;
    const functions = [
      { from: 'before', to: 'before_end' },
      { from: 'after', to: 'after_end' },
    ];
    expect(prove(source, { functions })).toMatchObject({ found: true, entries: 5 });
  });

  it.each([
    ['after', 'cold part after the function', (hot: string, cold: string) => `${hot}\n${cold}`],
    ['before', 'cold part before the function', (hot: string, cold: string) => `${cold}\n${hot}`],
  ])('a fragment with chained unwind data: the %s', (_, __, join) => {
    const hot = withTable(`
      cmp eax, 4
      ja default
      jmp cold`).replace('end:', 'f_end:');
    const cold = `int3\nint3\ncold: lea rdx, [rip+image]${DISPATCH}\ncold_end:`;
    const functions = [
      { from: 'f', to: 'f_end' },
      { from: 'cold', to: 'cold_end', chainedTo: 'f' },
    ];
    expect(prove(join(hot, cold), { functions })).toMatchObject({ found: true, entries: 5 });
  });

  it('no code at the load', () => {
    const source = withTable(`${GUARDED}${DISPATCH}`);
    const { image, functions, rva } = assemble(source);
    const recogniser = new SwitchRecogniser(image, functions);
    for (const place of [
      0,
      rva('load') + 1,
      rva('table'),
      image.sizeOfImage,
      image.sizeOfImage + 0x1000,
      -1,
    ]) {
      expect(recogniser.prove(place)).toMatchObject({ found: false });
    }
  });
});

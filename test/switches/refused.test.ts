import { describe, expect, it } from 'vitest';
import type { RefusalReason } from '../../src/switches/table.js';
import { FLAGS } from '../nt/pe-builder.js';
import { DISPATCH, type Ending, GUARDED, withTable } from './cases.js';
import { assemble, type ListingOptions, prove } from './listing.js';

interface Refusal {
  readonly hazard: string;
  readonly code: string;
  readonly reason: RefusalReason;
  readonly ending?: Ending;
  readonly options?: ListingOptions & { readonly load?: string };
}

const IMAGE_BASE = `
      lea rdx, [rip+image]`;
const CALLEE: Ending = { more: 'callee: ret' };

/** What looks like a guard of 4, and is none: the table ends with the function then, not behind its 5 entries. */
const BOUNDS: Omit<Refusal, 'reason'>[] = [
  { hazard: 'no guard', code: `${IMAGE_BASE}${DISPATCH}` },
  {
    hazard: 'a guard on another register',
    code: `cmp r8d, 4
      ja default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a compare whose flags nobody asks for',
    code: `cmp eax, 4
      je default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a guard on 32 bits where 64 are used',
    code: `mov rax, r9
      cmp eax, 4
      ja default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a guard on 8 bits where 32 are used',
    code: `cmp al, 4
      ja default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a guard on 16 bits where 32 are used',
    code: `cmp ax, 4
      ja default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a guard on bits 8 to 15',
    code: `mov eax, r9d
      cmp ah, 4
      ja default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a signed guard, which a negative index passes',
    code: `cmp eax, 4
      jg default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a signed guard on 64 bits',
    code: `movsxd rax, eax
      cmp rax, 4
      jg default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a guard with the branch the wrong way round',
    code: `cmp eax, 4
      jb default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a limit in a register that is not known',
    code: `cmp eax, r8d
      ja default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a limit in memory',
    code: `cmp eax, [r8]
      ja default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a limit above what any table has',
    code: `cmp eax, 0x4000
      ja default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a compare with -1',
    code: `cmp eax, -1
      ja default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a way around the guard',
    code: `test r8d, r8d
      jne around
      cmp eax, 4
      ja default
around:${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a way around the guard, from behind the load',
    code: `cmp eax, 4
      ja default
around:${IMAGE_BASE}${DISPATCH}
again: mov eax, r8d
      jmp around`,
    ending: { more: 'call again' },
  },
  {
    hazard: 'flags that a later instruction sets',
    code: `cmp eax, 4
      inc r8d
      ja default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'flags that a call does not keep',
    code: `mov edi, eax
      cmp edi, 4
      call callee
      ja default${IMAGE_BASE}
      mov eax, edi${DISPATCH}`,
    ending: CALLEE,
  },
  {
    hazard: 'an index that grows after the guard',
    code: `cmp eax, 4
      ja default
      inc eax${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'an index that lea changes after the guard',
    code: `cmp eax, 4
      ja default
      lea eax, [rax+rax]${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'an index whose bias is subtracted after the guard',
    code: `cmp eax, 4
      ja default
      sub eax, 2${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'an index that is negated after the guard',
    code: `cmp eax, 4
      ja default
      neg eax${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'an index exchanged after the guard',
    code: `cmp eax, 4
      ja default
      xchg eax, r8d${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'an index whose second byte is written after the guard',
    code: `cmp eax, 4
      ja default
      mov ah, r8b${IMAGE_BASE}${DISPATCH}`.replace('r8b', 'cl'),
  },
  {
    hazard: 'an index that a call may change after the guard',
    code: `cmp eax, 4
      ja default
      call callee${IMAGE_BASE}${DISPATCH}`,
    ending: CALLEE,
  },
  {
    hazard: 'an index that an implicit operand changes after the guard',
    code: `cmp eax, 4
      ja default
      cpuid${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'an index that grows in a loop',
    code: `${IMAGE_BASE}
      cmp eax, 4
      ja default
grow: inc eax
      test r8d, r8d
      jne grow${DISPATCH}`,
  },
  {
    hazard: 'an index that a loop changes on its second pass only',
    code: `${IMAGE_BASE}
      cmp eax, 4
      ja default
next: test r8d, r8d
      jne load
      mov eax, r9d
      mov r8d, 1
      jmp next${DISPATCH}`,
  },
  {
    hazard: 'a cmov of something not bounded',
    code: `cmp eax, 4
      ja default
      test r8d, r8d
      cmove eax, r9d${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a cmov that lets the large ones through',
    code: `mov ecx, 4
      cmp eax, ecx
      cmovb eax, ecx${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a sign extension of a byte that may be negative',
    code: `movsx rax, cl
      cmp al, 4
      jg default${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a mask with a hole at the top: sign-extended to 64 bits',
    code: `mov rax, r9
      and rax, -8${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a slot below rsp, which an interrupt overwrites',
    code: `mov [rsp-8], eax
      cmp eax, 4
      ja default
      mov eax, [rsp-8]${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'an or with an unknown after the guard',
    code: `cmp eax, 4
      ja default
      or eax, r8d${IMAGE_BASE}${DISPATCH}`,
  },
];

/** The guard lets more through than the table has. */
const OVERREACHING: Omit<Refusal, 'reason'>[] = [
  {
    hazard: 'code behind it',
    code: `${GUARDED}${DISPATCH}`,
    ending: {
      entries: 0,
      more: 'jmp over\n.balign 4, 0xcc\ntable: .long case-image\nover: .rept 8\n add [rax], al\n .endr',
    },
  },
  {
    hazard: 'code behind it that is no entry',
    code: `${GUARDED}${DISPATCH}`,
    ending: {
      entries: 0,
      more: 'jmp over\n.balign 4, 0xcc\ntable: .long case-image\nover: mov eax, 0x12345678',
    },
  },
  {
    hazard: 'another table behind it',
    code: `${GUARDED}${DISPATCH}
f2:   mov r8d, r8d
      cmp r8d, 2
      ja default
      lea r9, [rip+image]
      mov r10d, [r9+r8*4+other-image]
      add r10, r9
      jmp r10`,
    ending: { entries: 4 },
  },
];

const SLOTS: Omit<Refusal, 'reason'>[] = [
  ['a slot that a call may write', 'call callee'],
  ['a slot that a store through a pointer may hit', 'mov [r8], r9d'],
  ['a slot that a string instruction may hit', 'rep stosb'],
  ['a slot that is partly overwritten', 'mov byte ptr [rsp+0x21], 1'],
  ['a slot that a vector store overwrites', 'movups [rsp+0x18], xmm0'],
  ['a slot whose frame has moved', 'sub rsp, 8'],
  ['a slot that pop overwrites', 'pop qword ptr [rsp+0x18]\n push rcx'],
  ['a slot that xchg overwrites', 'xchg [rsp+0x20], r9d'],
  ['a slot that cmpxchg may overwrite', 'lock cmpxchg [rsp+0x20], r9d'],
  ['a slot that a store relative to gs may hit', 'mov gs:[rip+image], r9d'],
  ['a slot that inc changes', 'inc dword ptr [rsp+0x20]'],
].map(([hazard, change]) => ({
  hazard: hazard!,
  code: `sub rsp, 0x28
      mov [rsp+0x20], eax
      cmp eax, 4
      ja default
      ${change}
      mov eax, [rsp+0x20]${IMAGE_BASE}${DISPATCH}`,
  ending: CALLEE,
}));

const BASES: Omit<Refusal, 'reason'>[] = [
  {
    hazard: 'a base that is not ImageBase',
    code: `cmp eax, 4
      ja default
      lea rdx, [rip+image+0x10]${DISPATCH}`,
  },
  { hazard: 'a base that nobody has set', code: `cmp eax, 4\n ja default${DISPATCH}` },
  {
    hazard: 'a base that a call may change',
    code: `${IMAGE_BASE}
      call callee
      mov eax, eax
      cmp eax, 4
      ja default${DISPATCH}`,
    ending: CALLEE,
  },
  {
    hazard: 'a base that is ImageBase on one way only',
    code: `cmp eax, 4
      ja default
      test r8d, r8d
      jne load${IMAGE_BASE}${DISPATCH}`,
  },
  {
    hazard: 'a base of 32 bits',
    code: `cmp eax, 4
      ja default
      lea rdx, [rip+image]
      mov edx, edx${DISPATCH}`,
  },
  {
    hazard: 'something else than ImageBase is added',
    code: `${GUARDED}
load: mov ecx, [rdx+rax*4+table-image]
      add rcx, r8
      jmp rcx`,
  },
];

const REFUSALS: Refusal[] = [
  ...BASES.map((refusal) => ({ ...refusal, reason: 'base-not-proven' as const })),
  {
    hazard: 'a load without a jump',
    code: `${GUARDED}
load: mov ecx, [rdx+rax*4+table-image]
      mov eax, ecx
      ret`,
    reason: 'not-a-switch',
  },
  {
    hazard: 'a call through the table',
    code: `${GUARDED}
load: mov ecx, [rdx+rax*4+table-image]
      add rcx, rdx
      call rcx
      ret`,
    reason: 'not-a-switch',
  },
  {
    hazard: 'self-relative entries with sign extension, as clang has them',
    code: `${GUARDED}
load: movsxd rcx, dword ptr [rdx+rax*4+table-image]
      add rcx, rdx
      jmp rcx`,
    reason: 'not-a-table-load',
  },
  {
    hazard: 'a table of 8-byte addresses',
    code: `${GUARDED}
load: mov rcx, [rdx+rax*8+table-image]
      jmp rcx`,
    reason: 'not-a-dword-load',
  },
  {
    hazard: 'a table of words',
    code: `${GUARDED}
load: movzx ecx, word ptr [rdx+rax*2+table-image]
      add rcx, rdx
      jmp rcx`,
    reason: 'not-a-dword-load',
  },
  {
    hazard: 'dwords at every byte',
    code: `${GUARDED}
load: mov ecx, [rdx+rax*1+table-image]
      add rcx, rdx
      jmp rcx`,
    reason: 'scale-not-4',
  },
  {
    hazard: 'dwords at every second one',
    code: `${GUARDED}
load: mov ecx, [rdx+rax*8+table-image]
      add rcx, rdx
      jmp rcx`,
    reason: 'scale-not-4',
  },
  {
    hazard: 'an address of 32 bits',
    code: `${GUARDED}
load: mov ecx, [edx+eax*4+table-image]
      add rcx, rdx
      jmp rcx`,
    reason: 'address-size-prefix',
  },
  {
    hazard: 'a displacement outside the image',
    code: `${GUARDED}
load: mov ecx, [rdx+rax*4+0x7000000]
      add rcx, rdx
      jmp rcx`,
    reason: 'table-outside-image',
  },
  {
    hazard: 'an entry outside the image',
    code: `${GUARDED}${DISPATCH}`,
    ending: { entries: 4, more: '.balign 4, 0xcc\ntable: .long 0x7fffffff\n.set other_table, .' },
    reason: 'entry-outside-image',
  },
  {
    hazard: 'an entry in the middle of an instruction',
    code: `${GUARDED}${DISPATCH}`,
    ending: { entries: 4, more: '.balign 4, 0xcc\ntable: .long case+1-image' },
    reason: 'entry-not-an-instruction',
  },
  {
    hazard: 'an entry in a section without code',
    code: `${GUARDED}${DISPATCH}`,
    ending: { entries: 4, more: '.balign 4, 0xcc\ntable: .long data-image' },
    options: { sections: [{ name: '.rdata', at: 'data', flags: FLAGS.data }] },
    reason: 'entry-not-executable',
  },
  {
    hazard: 'an entry in another function',
    code: `${GUARDED}${DISPATCH}`,
    ending: { entries: 4, more: '.balign 4, 0xcc\ntable: .long stranger-image' },
    reason: 'entry-not-an-instruction',
  },
  {
    hazard: 'a jump through a register that leads nowhere known',
    code: `test r8d, r8d
      je other_way
      jmp r9
other_way:${GUARDED}${DISPATCH}`,
    reason: 'indirect-jump-unresolved',
  },
  {
    hazard: 'a jump through a table of addresses',
    code: `test r8d, r8d
      je other_way
      jmp qword ptr [r9+r10*8]
other_way:${GUARDED}${DISPATCH}`,
    reason: 'indirect-jump-unresolved',
  },
];

/** The label `table` of the ending, where a case brings a table's beginning of its own. */
function listing({ code, ending }: Pick<Refusal, 'code' | 'ending'>): string {
  const own = ending?.more?.includes('\ntable:');
  const source = withTable(code, ending);
  const tail = '\nud2\n.balign 16, 0xcc\nstranger: ret\n.balign 0x1000, 0xcc\ndata: .long 0\n';
  return (own ? source.replace(/\n {6}\.balign 4, 0xcc\ntable: \.rept/, '\n .rept') : source) + tail;
}

describe('a load that is refused', () => {
  it.each(REFUSALS)('$hazard: $reason', ({ reason, options, ...rest }) => {
    expect(prove(listing(rest), options)).toMatchObject({ found: false, reason });
  });

  it.each([...BOUNDS, ...SLOTS])('$hazard: no guard', (unguarded) => {
    const site = prove(listing(unguarded), unguarded.options);
    expect(site).toMatchObject({ found: true, evidence: 'neighbour', entries: 8 });
  });

  it.each(OVERREACHING)('$hazard behind a table that ends before its guard does: a guess', (overreaching) => {
    const entries = overreaching.ending!.entries || 1;
    const site = prove(listing(overreaching), overreaching.options);
    expect(site).toMatchObject({ found: true, evidence: 'none', entries });
  });

  it('names the table and the form, as far as they are known', () => {
    const source = listing(BOUNDS[0]!).replace('table: .rept', 'table: .long 0x7fffffff\n.rept');
    const { rva } = assemble(source);
    expect(prove(source)).toEqual({
      found: false,
      rva: rva('load'),
      reason: 'bound-not-proven',
      form: 'one-level',
      table: rva('table'),
    });
  });

  it.each([
    ['.rdata', FLAGS.data, 'table-not-in-executable-section'],
    ['.data', FLAGS.writableData, 'table-not-in-executable-section'],
    ['RWX', FLAGS.writableCode, 'table-in-writable-section'],
  ])('a table in %s', (name, flags, reason) => {
    const source = `f: mov eax, eax${GUARDED}${DISPATCH}
case: inc ebx
default: ret
end:  .balign 0x1000
table: .rept 5
      .long case-image
      .endr`;
    expect(prove(source, { sections: [{ name, at: 'table', flags }] })).toMatchObject({
      found: false,
      reason,
    });
  });
});

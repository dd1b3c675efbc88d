// Ways to a load that are easy to overlook. Each listing has a guarded way to `join`, and one on which nothing
// bounds the index; who misses the second one takes the guard for a proof that it is not.
import { describe, expect, it } from 'vitest';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage } from '../../src/nt/pe.js';
import { type RefusalReason, SwitchRecogniser } from '../../src/switches/table.js';
import { FLAGS } from '../nt/pe-builder.js';
import { assemble, type ListingOptions, prove } from './listing.js';

const JOIN = `
join: lea rdx, [rip+image]
load: mov ecx, [rdx+rax*4+table-image]
      add rcx, rdx
      jmp rcx
case: inc ebx
default: ret`;
const TABLE = `
      .balign 4, 0xcc
table: .rept 5
      .long case-image
      .endr`;
const GUARD = `
      mov eax, eax
      cmp eax, 4
      ja default`;

interface Hazard {
  readonly hazard: string;
  readonly source: string;
  readonly options?: ListingOptions;
  readonly reason?: RefusalReason;
}

const HAZARDS: Hazard[] = [
  {
    hazard: 'an __except block',
    source: `f: call callee
      ${GUARD}${JOIN}
callee: ret
handler: jmp join
${TABLE}
end:`,
    options: { functions: [{ from: 'f', to: 'end', handlers: ['handler'] }] },
  },
  {
    hazard: 'an __except block that normal flow reaches too',
    source: `f: call callee
      ${GUARD}
handler: nop${JOIN}
callee: ret
${TABLE}
end:`,
    options: { functions: [{ from: 'f', to: 'end', handlers: ['handler'] }] },
  },
  {
    hazard: 'code that only a call of the same function reaches',
    source: `f: test r8d, r8d
      jne g
      ${GUARD}${JOIN}
g:    call join
      ret
${TABLE}
end:`,
  },
  {
    hazard: 'code behind a call that seems not to return',
    source: `f: test r8d, r8d
      je g
      call callee
      int3
      jmp join
g:    ${GUARD}${JOIN}
callee: ret
${TABLE}
end:`,
  },
  {
    hazard: 'code that nothing seems to lead to',
    source: `f: ${GUARD}
      jmp join
      mov eax, [r8]
${JOIN}
${TABLE}
end:`,
  },
  {
    hazard: 'a case of another switch',
    source: `f: test r8d, r8d
      je g
      mov r9d, r9d
      cmp r9d, 1
      ja default
      lea r10, [rip+image]
      mov r11d, [r10+r9*4+table1-image]
      add r11, r10
      jmp r11
g:    ${GUARD}${JOIN}
      .balign 4, 0xcc
table1: .long join-image, default-image
${TABLE}
end:`,
  },
  {
    hazard: 'a case of another switch, whose table is not proven',
    source: `f: test r8d, r8d
      je g
      lea r10, [rip+image]
      mov r11d, [r10+r9*4+table1-image]
      add r11, r10
      jmp r11
g:    ${GUARD}${JOIN}
      .balign 4, 0xcc
table1: .long join-image, default-image
${TABLE}
end:`,
  },
  {
    hazard: 'a case of another switch, by a jump to a thunk that is not next to the add',
    source: `f: test r8d, r8d
      je g
      mov r9d, r9d
      cmp r9d, 1
      ja default
      lea r10, [rip+image]
      mov r11d, [r10+r9*4+table1-image]
      add r11, r10
      mov r8d, 1
      jmp thunk
g:    ${GUARD}${JOIN}
      .balign 4, 0xcc
table1: .long join-image, default-image
${TABLE}
end:  .balign 16, 0xcc
thunk: jmp r11`,
  },
  {
    hazard: 'a jump to entries that are not relative to ImageBase',
    source: `f: test r8d, r8d
      je g
      mov r9d, r9d
      cmp r9d, 1
      ja default
      lea r10, [rip+image]
      mov r11d, [r10+r9*4+table1-image]
      lea r10, [rip+f]
      add r11, r10
      jmp r11
g:    ${GUARD}${JOIN}
      .balign 4, 0xcc
table1: .long join-f, default-f
${TABLE}
end:`,
    reason: 'indirect-jump-unresolved',
  },
  {
    hazard: 'a jump through a table that may be written to',
    source: `f: test r8d, r8d
      je g
      mov r9d, r9d
      cmp r9d, 1
      ja default
      lea r10, [rip+image]
      mov r11d, [r10+r9*4+table1-image]
      add r11, r10
      jmp r11
g:    ${GUARD}${JOIN}
${TABLE}
end:  .balign 0x1000
table1: .long default-image, default-image`,
    options: { sections: [{ name: '.data', at: 'table1', flags: FLAGS.writableData }] },
    reason: 'indirect-jump-unresolved',
  },
  {
    hazard: 'the start of a function that has a colder fragment before it',
    source: `cold: ${GUARD}
      jmp f
cold_end: .balign 16, 0xcc
f:    test r8d, r8d
      jne cold
${JOIN}
${TABLE}
end:`,
    options: {
      functions: [
        { from: 'f', to: 'end' },
        { from: 'cold', to: 'cold_end', chainedTo: 'f' },
      ],
    },
  },
  {
    hazard: 'the start of a leaf function that follows another without padding, and is jumped to',
    source: `f: ${GUARD}
      jmp leaf
      .balign 16, 0x90
      .fill 15, 1, 0x90
      ret
leaf: nop
${JOIN}
${TABLE}
end:`,
    options: { functions: [] },
  },
  {
    hazard: 'instructions that begin inside others',
    source: `f: test r8d, r8d
      je g
bare: .byte 0x41, 0xb8
      nop
      nop
      nop
      nop
      jmp join
g:    ${GUARD}
      jmp bare+2
${JOIN}
${TABLE}
end:`,
  },
  {
    hazard: 'a load inside another instruction that two ways reach',
    source: `f: test r8d, r8d
      je g
bare: .byte 0x41, 0xb8
      nop
      nop
      nop
      nop
      lea rdx, [rip+image]
load: mov ecx, [rdx+rax*4+table-image]
      add rcx, rdx
      jmp rcx
g:    ${GUARD}
      jmp bare+2
case: inc ebx
default: ret
${TABLE}
end:`,
  },
  {
    hazard: 'code in what an array load seems to make a table',
    source: `f: mov r10d, [r11+r9*4+hidden-image]
      add r10, rbx
      ${GUARD}
      jmp join
hidden: mov eax, [r8]
      jmp join
${JOIN}
${TABLE}
end:`,
  },
  {
    hazard: 'a leaf function that a switch without a case 0 seems to have its table in',
    source: `f: mov r9d, r9d
      cmp r9d, 4
      ja next
      lea r10, [rip+image]
      mov r11d, [r10+r9*4+leaf-image]
      add r11, r10
      jmp r11
next: ${GUARD}
      jmp join
      .balign 16, 0xcc
leaf: mov eax, 0x12345678
      mov eax, [r8]
      jmp join
${JOIN}
${TABLE}
end:`,
    options: { functions: [] },
  },
];

describe('a load that a second way leads to', () => {
  it.each(HAZARDS)('$hazard', ({ source, options, reason }) => {
    const site = prove(source, options);
    expect(site).toMatchObject({ found: reason === undefined, ...(reason && { reason }) });
    if (site.found) expect(site.evidence).not.toBe('guard');
  });

  it('is proven where only the data of another kind of handler, such as a stack cookie, leads to it', () => {
    const source = `f: call callee
      ${GUARD}
handler: nop${JOIN}
callee: ret
${TABLE}
end:`;
    const { file, rva } = assemble(source, {
      functions: [{ from: 'f', to: 'end', handlers: ['handler'] }],
    });
    const scope = Buffer.alloc(16);
    [rva('f'), rva('end'), 1, rva('handler')].forEach((field, n) => {
      scope.writeUInt32LE(field, n * 4);
    });
    const proofOf = (file: Buffer) => {
      const image = PeImage.fromFile(file);
      return new SwitchRecogniser(image, FunctionTable.read(image)).prove(rva('load'));
    };
    expect(proofOf(file)).toMatchObject({ evidence: 'neighbour' });
    file.writeUInt32LE(0x50, file.indexOf(scope)); // a range that is none
    expect(proofOf(file)).toMatchObject({ evidence: 'guard', entries: 5 });
  });

  it('is proven without that way', () => {
    expect(prove(`f: ${GUARD}${JOIN}${TABLE}\nend:`)).toMatchObject({
      found: true,
      entries: 5,
      evidence: 'guard',
    });
  });
});

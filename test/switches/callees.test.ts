import { describe, expect, it } from 'vitest';
import { DISPATCH, withTable } from './cases.js';
import { prove } from './listing.js';

/** ImageBase is in rdx before a call of `callee`, another function, and used behind it. */
function proveAfterCallOf(callee: string, call = 'call callee', handlers?: readonly string[]) {
  const source = withTable(`
      lea rdx, [rip+image]
      ${call}
      mov eax, eax
      cmp eax, 4
      ja default${DISPATCH}`);
  return prove(
    `${source}\n.balign 16, 0xcc\n${callee}\n.balign 16, 0xcc\nstranger: xor edx, edx\n ret\nlast:`,
    {
      functions: [
        { from: 'f', to: 'end' },
        { from: 'callee', to: 'callee_end', ...(handlers && { handlers }) },
      ],
    },
  );
}

describe('a volatile register that holds the base across a call', () => {
  it.each([
    ['a function that changes others', 'callee: mov eax, ecx\n inc r8d\n ret\ncallee_end:'],
    ['a function that loops', 'callee: dec ecx\n jnz callee\n ret\ncallee_end:'],
    [
      'a function that calls such a one',
      'callee: call inner\n ret\ncallee_end: .balign 16, 0xcc\ninner: inc eax\n ret',
    ],
    ['a function that leaves for such a one', 'callee: jmp inner\ncallee_end: .balign 16, 0xcc\ninner: ret'],
  ])('is proven behind %s', (_, callee) => {
    expect(proveAfterCallOf(callee)).toMatchObject({
      found: true,
      evidence: 'guard',
      entries: 5,
      base: 'rdx',
    });
  });

  it.each([
    ['a function that changes it', 'callee: xor edx, edx\n ret\ncallee_end:'],
    ['a function that changes a part of it', 'callee: mov dl, 1\n ret\ncallee_end:'],
    ['one that changes it on one way', 'callee: test ecx, ecx\n jz 1f\n xor edx, edx\n1: ret\ncallee_end:'],
    ['one that calls one that does', 'callee: call stranger\n ret\ncallee_end:'],
    ['one that leaves to one that does', 'callee: jmp stranger\ncallee_end:'],
    ['one that leaves for one that does on a condition', 'callee: jz stranger\n ret\ncallee_end:'],
    ['one that calls itself', 'callee: call callee\n ret\ncallee_end:'],
    ['one that calls through memory', 'callee: call [rip+image]\n ret\ncallee_end:'],
    ['one that jumps through a register', 'callee: jmp rax\ncallee_end:'],
    ['one that makes a system call', 'callee: syscall\n ret\ncallee_end:'],
    ['one whose code is none', 'callee: .byte 0x06\n ret\ncallee_end:'],
  ])('is not proven behind %s', (_, callee) => {
    expect(proveAfterCallOf(callee)).toMatchObject({ found: false, reason: 'base-not-proven' });
  });

  it('is not proven behind one that may go on behind an exception', () => {
    const callee = 'callee: mov eax, [rcx]\n ret\nexcept: xor edx, edx\n ret\ncallee_end:';
    expect(proveAfterCallOf(callee)).toMatchObject({ found: true });
    const handled = proveAfterCallOf(callee, 'call callee', ['except']);
    expect(handled).toMatchObject({ found: false, reason: 'base-not-proven' });
  });

  it('is not proven behind a call through memory', () => {
    const site = proveAfterCallOf('callee: ret\ncallee_end:', 'call [rip+image]');
    expect(site).toMatchObject({ found: false, reason: 'base-not-proven' });
  });
});

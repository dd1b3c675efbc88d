import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { functionAt } from '../../src/switches/functions.js';
import { analyse } from '../../src/switches/interpreter.js';
import { type Liveness, livenessAt } from '../../src/switches/liveness.js';
import { SwitchRecogniser } from '../../src/switches/table.js';
import type { GprName, Registers } from '../../src/x86/registers.js';
import { createFlatMachine, KERNEL_BASE } from '../machine/support.js';
import { GUARDED } from './cases.js';
import { assemble, CODE_RVA, type Listing, type ListingOptions } from './listing.js';
import { FRAME_BYTES, FRAME_POINTER, randomFunction } from './random-function.js';

/** Is rcx, to which the switch writes, or are the flags read at the case? */
function liveAtCase(code: string, more = '', options: ListingOptions = {}) {
  const source = `
f:    mov eax, eax${GUARDED}
load: mov ecx, [rdx+rax*4+table-image]
      add rcx, rdx
      jmp rcx
case: ${code}
default: ret
${more}
      .balign 4, 0xcc
table: .rept 5
      .long case-image
      .endr
end:  .balign 16, 0xcc
callee: ret
stranger: ret`;
  const { image, functions, rva } = assemble(source, options);
  const site = new SwitchRecogniser(image, functions).prove(rva('load'));
  if (!site.found) throw new Error(`refused: ${site.reason}`);
  const { registers, flags } = site.liveAtCases.get(rva('case'))!;
  return { rcx: registers.has('rcx'), flags };
}

const DEAD = { rcx: false, flags: false };
const RCX = { rcx: true, flags: false };
const FLAGS = { rcx: false, flags: true };
const BOTH = { rcx: true, flags: true };

describe('what is read at a case', () => {
  it.each([
    ['a return: rcx is nobody’s', 'ret', DEAD],
    ['overwritten before the return', 'xor ecx, ecx', DEAD],
    ['read', 'mov eax, ecx', RCX],
    ['a part of it is read', 'movzx eax, ch', RCX],
    ['a part of it is overwritten, then all is read', 'mov cl, 1\n mov eax, ecx', RCX],
    ['an address', 'mov eax, [rbx+rcx]', RCX],
    ['the shift of another register', 'shl eax, cl', RCX],
    ['cleared without being read', 'xor ecx, ecx\n mov eax, ecx', DEAD],
    ['a conditional move keeps it', 'test eax, eax\n cmove ecx, eax\n mov eax, ecx', RCX],
    ['a conditional jump', 'jc default\n inc ebx', FLAGS],
    ['the carry, which inc leaves alone', 'inc eax\n jc default\n inc ebx', FLAGS],
    ['the flags, which a shift by 0 leaves alone', 'mov cl, 0\n shl eax, cl\n jz default\n inc ebx', BOTH],
    ['the flags, set before they are asked for', 'cmp eax, 1\n jc default\n inc ebx', DEAD],
    ['a call: of whatever convention', 'call callee', RCX],
    ['a call of an import', 'call [rip+image]', RCX],
    ['a jump to another function', 'jmp stranger', BOTH],
    ['a jump that may go anywhere', 'rex.W jmp r8', BOTH],
    ['a system call, which has overwritten rcx by itself', 'syscall', FLAGS],
    ['a breakpoint', 'int3\n nop', BOTH],
    ['no instruction', 'ud2', BOTH],
    ['read on one of two ways', 'test eax, eax\n jz default\n mov eax, ecx', RCX],
    ['read in a loop', '1: test eax, eax\n jz 2f\n mov eax, ecx\n jmp 1b\n2: ret', RCX],
  ])('%s', (_, code, expected) => {
    expect(liveAtCase(code)).toEqual(expected);
  });

  it('an exception handler that any instruction may lead to', () => {
    const more = 'handler: mov eax, ecx\n ret';
    const functions = [{ from: 'f', to: 'end', handlers: ['handler'] }];
    expect(liveAtCase('nop', more)).toEqual(DEAD);
    expect(liveAtCase('nop', more, { functions })).toEqual(RCX);
  });

  it('the cases of the next switch, if its table’s end is known', () => {
    const next = (limit: number) => `and r8d, ${limit}
      lea r9, [rip+image]
      mov r10d, [r9+r8*4+next-image]
      add r10, r9
      jmp r10
one:  mov eax, ecx
      ret
two:  xor ecx, ecx
      ret`;
    const table = (first: string) => `.balign 4, 0xcc\nnext: .long ${first}-image, two-image`;
    expect(liveAtCase(next(1), table('one'))).toEqual(RCX);
    expect(liveAtCase(next(1), table('two'))).toEqual(DEAD);
    // The mask lets indices through that have no entry: the rest may be anything.
    expect(liveAtCase(next(3), `${table('two')}\n int3`)).toEqual(RCX);
  });
});

const machine = createFlatMachine();
afterAll(() => machine.close());

const IMAGE_GPA = 0x10_0000n;
const IMAGE_BASE = KERNEL_BASE + IMAGE_GPA;
const STACK = KERNEL_BASE + 0x20_0000n;
const MOST_INSTRUCTIONS = 60;
const ASKED = ['rax', 'rcx', 'r8', 'rdi', 'rbp', 'r9', 'r10'] as const satisfies readonly GprName[];
/** The caller finds the others as the function leaves them. */
const LOOKED_AT = ['rax', 'rdx', 'rbx', 'rsp', 'rbp', 'rsi', 'rdi', 'r12', 'r13', 'r14', 'r15'] as const;
const STATUS_FLAGS = 0x8d5n;

const word = fc.oneof(fc.bigInt(0n, 17n), fc.bigInt(0n, (1n << 64n) - 1n));
const start = fc.record({
  registers: fc.array(word, { minLength: ASKED.length, maxLength: ASKED.length }),
  others: fc.array(word, { minLength: ASKED.length, maxLength: ASKED.length }),
  flags: word,
  frame: fc.array(word, { minLength: FRAME_BYTES / 8 + 1, maxLength: FRAME_BYTES / 8 + 1 }),
});
type Start = typeof start extends fc.Arbitrary<infer T> ? T : never;

/** The instructions that are executed from `rva` on, and what the caller sees if the end is reached. */
function run({ code, rva }: Listing, at: number, registers: Partial<Registers>, frame: readonly bigint[]) {
  machine.writePhysical(IMAGE_GPA + BigInt(CODE_RVA), code);
  const bytes = Buffer.alloc(frame.length * 8);
  frame.forEach((content, n) => {
    bytes.writeBigUInt64LE(content, n * 8);
  });
  machine.writePhysical(STACK - KERNEL_BASE, bytes);
  machine.setRegisters(0, {
    ...{ rdx: IMAGE_BASE, rsp: STACK, [FRAME_POINTER]: STACK },
    ...registers,
    rip: IMAGE_BASE + BigInt(at),
  });
  const way: bigint[] = [];
  while (way.length < MOST_INSTRUCTIONS) {
    const now = machine.registers(0);
    way.push(now.rip);
    if (now.rip === IMAGE_BASE + BigInt(rva('done'))) {
      return { way, registers: LOOKED_AT.map((name) => now[name]) };
    }
    const { retired, trap } = machine.step(0, 1);
    if (retired !== 1 || trap !== undefined) break; // a load with a wild address
  }
  return { way, registers: [] };
}

/** What the whole property has seen, so that it cannot pass by seeing nothing. */
const seen = { deadRegisters: 0, deadFlags: 0, ends: 0 };

/** Other contents of what is dead at `at` must not show. */
function check(listing: Listing, at: number, live: Liveness, begin: Start): void {
  const dead = ASKED.filter((name) => !live.registers.has(name));
  const { registers, others, flags, frame } = begin;
  const one: Partial<Registers> = { rflags: 2n };
  ASKED.forEach((name, n) => {
    one[name] = registers[n]!;
  });
  const other = { ...one, rflags: live.flags ? 2n : 2n | (flags & STATUS_FLAGS) };
  for (const name of dead) other[name] = others[ASKED.indexOf(name)]!;
  const expected = run(listing, at, one, frame);
  seen.deadRegisters += dead.length;
  if (!live.flags) seen.deadFlags++;
  if (expected.registers.length > 0) seen.ends++;
  expect(run(listing, at, other, frame)).toEqual(expected);
}

describe('random functions, executed', () => {
  it('nothing comes out differently for other contents of dead registers and flags', () => {
    fc.assert(
      fc.property(randomFunction, fc.array(start, { minLength: 2, maxLength: 2 }), (made, starts) => {
        const functions = [
          { from: 'f', to: 'end' },
          { from: 'callee', to: 'callee_end' },
        ];
        const listing = assemble(made.source, { functions });
        const code = functionAt(listing.image, listing.functions, listing.rva('f'))!;
        const analysis = analyse(listing.image, code);
        if (analysis.outcome !== 'complete') return;
        const starting = Array.from({ length: made.statements }, (_, n) => listing.rva(`s${n}`));
        for (const [at, live] of livenessAt(analysis, starting, ASKED, () => undefined)) {
          for (const begin of starts) check(listing, at, live, begin);
        }
      }),
      { numRuns: Number(process.env.MEMTABLES_RANDOM_RUNS ?? 60) },
    );
    expect(seen.deadRegisters).toBeGreaterThan(500);
    expect(seen.deadFlags).toBeGreaterThan(100);
    expect(seen.ends).toBeGreaterThan(100);
  });
});

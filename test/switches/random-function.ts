import fc from 'fast-check';
import type { GprName } from '../../src/x86/registers.js';

/** Registers that hold indices. Calls keep rdi and rbp only. */
const INDICES = ['rax', 'rcx', 'r8', 'rdi', 'rbp'] as const satisfies readonly GprName[];
/** ImageBase, or what a function leaves there. */
const BASE = 'rdx';
/** Points into the frame, behind the back of who looks at offsets from RSP. */
export const FRAME_POINTER = 'r15';
export const FRAME_BYTES = 0x48;
const SLOTS = [0x20, 0x24, 0x28, 0x30, 0x38];

const TABLE_ENTRIES = 16;
const BYTES = 64;

const CONDITIONS = ['a', 'ae', 'b', 'be', 'e', 'ne', 'g', 'ge', 'l', 'le', 's', 'ns', 'o', 'no', 'p', 'np'];
/** The ones that guards are made of. */
const COMMON_CONDITIONS = ['a', 'ae', 'b', 'be'];

type Width = 8 | 16 | 32 | 64;
const NAMES: Record<(typeof INDICES)[number], Record<Width, string>> = {
  rax: { 8: 'al', 16: 'ax', 32: 'eax', 64: 'rax' },
  rcx: { 8: 'cl', 16: 'cx', 32: 'ecx', 64: 'rcx' },
  r8: { 8: 'r8b', 16: 'r8w', 32: 'r8d', 64: 'r8' },
  rdi: { 8: 'dil', 16: 'di', 32: 'edi', 64: 'rdi' },
  rbp: { 8: 'bpl', 16: 'bp', 32: 'ebp', 64: 'rbp' },
};
const SIZES: Record<Width, string> = { 8: 'byte ptr', 16: 'word ptr', 32: 'dword ptr', 64: 'qword ptr' };

/** Assembly text of one statement, which is number `at` of `count`; `target` picks a label. */
type Statement = (at: number, target: (pick: number) => string) => string;

const index = fc.constantFrom(...INDICES);
const width = fc.constantFrom<Width>(32, 32, 32, 64, 64, 16, 8);
const wide = fc.constantFrom<Width>(32, 64);
const condition = fc.oneof(fc.constantFrom(...COMMON_CONDITIONS), fc.constantFrom(...CONDITIONS));
const pick = fc.nat(1000);
const slot = fc.constantFrom(...SLOTS);
const small = fc.oneof(
  { weight: 6, arbitrary: fc.integer({ min: 0, max: 17 }) },
  { weight: 1, arbitrary: fc.constantFrom(-1, -2, -8, 31, 63, 100, 127, -128) },
);

function text(...parts: readonly fc.Arbitrary<unknown>[]) {
  return (make: (...values: never[]) => string): fc.Arbitrary<Statement> =>
    fc.tuple(...parts).map((values) => () => make(...(values as never[])));
}

const branches: fc.Arbitrary<Statement>[] = [
  // A guard as compilers write it.
  fc.tuple(index, wide, fc.integer({ min: 0, max: 15 }), fc.constantFrom(...COMMON_CONDITIONS), pick).map(
    ([r, w, limit, cc, to]): Statement =>
      (_, target) =>
        `cmp ${NAMES[r][w]}, ${limit}\n j${cc} ${target(to)}`,
  ),
  fc.tuple(condition, pick).map(
    ([cc, to]): Statement =>
      (_, target) =>
        `j${cc} ${target(to)}`,
  ),
  fc.tuple(slot, small, condition, pick).map(
    ([s, limit, cc, to]): Statement =>
      (_, target) =>
        `cmp dword ptr [rsp+${s}], ${limit}\n j${cc} ${target(to)}`,
  ),
  pick.map(
    (to): Statement =>
      (_, target) =>
        `jmp ${target(to)}`,
  ),
];

const compares = [
  text(index, width, small)((r: 'rax', w: Width, n: number) => `cmp ${NAMES[r][w]}, ${n}`),
  text(index, index, width)((a: 'rax', b: 'rax', w: Width) => `cmp ${NAMES[a][w]}, ${NAMES[b][w]}`),
  text(index, width)((r: 'rax', w: Width) => `test ${NAMES[r][w]}, ${NAMES[r][w]}`),
  text(index, width, small)((r: 'rax', w: Width, n: number) => `test ${NAMES[r][w]}, ${n}`),
];

const moves = [
  text(index, index, width)((a: 'rax', b: 'rax', w: Width) => `mov ${NAMES[a][w]}, ${NAMES[b][w]}`),
  text(index, width, small)((r: 'rax', w: Width, n: number) => `mov ${NAMES[r][w]}, ${n}`),
  text(
    fc.constantFrom('movzx', 'movsx'),
    index,
    index,
    wide,
    fc.constantFrom<Width>(8, 16),
  )((op: string, a: 'rax', b: 'rax', w: Width, from: Width) => `${op} ${NAMES[a][w]}, ${NAMES[b][from]}`),
  text(index, index)((a: 'rax', b: 'rax') => `movsxd ${a}, ${NAMES[b][32]}`),
  text()(() => 'cdqe'),
  text(
    condition,
    index,
    index,
    wide,
  )((cc: string, a: 'rax', b: 'rax', w: Width) => `cmov${cc} ${NAMES[a][w]}, ${NAMES[b][w]}`),
  text(index, index, width)((a: 'rax', b: 'rax', w: Width) => `xchg ${NAMES[a][w]}, ${NAMES[b][w]}`),
  text(condition, index)((cc: string, r: 'rax') => `set${cc} ${NAMES[r][8]}`),
];

const arithmetic = [
  text(
    fc.constantFrom('add', 'sub', 'and', 'and', 'xor', 'or'),
    index,
    width,
    small,
  )((op: string, r: 'rax', w: Width, n: number) => `${op} ${NAMES[r][w]}, ${n}`),
  text(
    fc.constantFrom('add', 'sub', 'and', 'xor', 'or'),
    index,
    index,
    width,
  )((op: string, a: 'rax', b: 'rax', w: Width) => `${op} ${NAMES[a][w]}, ${NAMES[b][w]}`),
  text(
    fc.constantFrom('inc', 'dec', 'neg', 'not'),
    index,
    width,
  )((op: string, r: 'rax', w: Width) => `${op} ${NAMES[r][w]}`),
  text(
    fc.constantFrom('shr', 'shr', 'shl', 'sar'),
    index,
    width,
    fc.nat(40),
  )((op: string, r: 'rax', w: Width, n: number) => `${op} ${NAMES[r][w]}, ${n}`),
  text(
    index,
    index,
    wide,
    small,
  )((a: 'rax', b: 'rax', w: Width, n: number) => `lea ${NAMES[a][w]}, [${b}+${n}]`),
  text(index, index)((a: 'rax', b: 'rax') => `lea ${a}, [${a}+${b}*2]`),
];

const frame = [
  text(slot, index, width)((s: number, r: 'rax', w: Width) => `mov [rsp+${s}], ${NAMES[r][w]}`),
  text(slot, index, width)((s: number, r: 'rax', w: Width) => `mov ${NAMES[r][w]}, [rsp+${s}]`),
  text(slot, index)((s: number, r: 'rax') => `movsxd ${r}, dword ptr [rsp+${s}]`),
  text(slot, width, small)((s: number, w: Width, n: number) => `mov ${SIZES[w]} [rsp+${s}], ${n}`),
  text(slot, width)((s: number, w: Width) => `inc ${SIZES[w]} [rsp+${s}]`),
  text(slot, index, width)((s: number, r: 'rax', w: Width) => `mov [${FRAME_POINTER}+${s}], ${NAMES[r][w]}`),
  text(slot)((s: number) => `mov [rsp+${s}], ${BASE}`),
  text(slot)((s: number) => `mov ${BASE}, [rsp+${s}]`),
  text(index, index)((a: 'rax', b: 'rax') => `push ${a}\n pop ${b}`),
];

const others = [
  text()(() => 'call callee'),
  text()(() => `lea ${BASE}, [rip+image]`),
  text()(() => `lea ${BASE}, [rip+image]`),
  text(index)((r: 'rax') => `mov ${BASE}, ${r}`),
];

/** What compilers put before a load; each part may be missing. */
const preparation = fc
  .record({
    extend: fc.boolean(),
    guard: fc.option(fc.tuple(wide, fc.integer({ min: 0, max: 15 }), fc.constantFrom('a', 'a', 'ae', 'g')), {
      freq: 2,
    }),
    base: fc.integer({ min: 0, max: 5 }),
  })
  .map(({ extend, guard, base }) => (r: (typeof INDICES)[number]) => {
    const lines: string[] = [];
    if (extend) lines.push(`mov ${NAMES[r][32]}, ${NAMES[r][32]}`);
    if (guard !== null) lines.push(`cmp ${NAMES[r][guard[0]]}, ${guard[1]}`, `j${guard[2]} done`);
    if (base > 0) lines.push(`lea ${BASE}, [rip+image]`);
    return lines.join('\n ');
  });

const switches: fc.Arbitrary<Statement>[] = [
  fc.tuple(index, preparation).map(
    ([r, prepare]): Statement =>
      (at) =>
        `${prepare(r)}
load${at}: mov r9d, [${BASE}+${r}*4+table-image]
 add r9, ${BASE}
 jmp r9`,
  ),
  fc.tuple(index, preparation, fc.boolean()).map(
    ([r, prepare, swapped]): Statement =>
      (at) =>
        `${prepare(r)}
byte${at}: movzx r10d, byte ptr [${swapped ? `${r}+${BASE}` : `${BASE}+${r}`}+bytes-image]
load${at}: mov r9d, [${BASE}+r10*4+table-image]
 add r9, ${BASE}
 jmp r9`,
  ),
];

const statement = fc.oneof(
  { weight: 5, arbitrary: fc.oneof(...branches) },
  { weight: 2, arbitrary: fc.oneof(...compares) },
  { weight: 4, arbitrary: fc.oneof(...moves) },
  { weight: 3, arbitrary: fc.oneof(...arithmetic) },
  { weight: 3, arbitrary: fc.oneof(...frame) },
  { weight: 2, arbitrary: fc.oneof(...others) },
  { weight: 4, arbitrary: fc.oneof(...switches) },
);

export interface RandomFunction {
  readonly source: string;
  /** How many statements there are: their labels are `s0` and so on, those of loads `load0`, `byte0`. */
  readonly statements: number;
}

/**
 * A function `f` that moves, bounds and changes indices, and jumps through a table of 16 entries; its cases are
 * its own statements. It ends at label `done`. `callee` changes what a call may change,
 * the flags too: nobody finds there what was in them before a call.
 */
export const randomFunction: fc.Arbitrary<RandomFunction> = fc
  .tuple(
    fc.array(statement, { minLength: 4, maxLength: 16 }),
    fc.array(pick, { minLength: 16, maxLength: 16 }),
  )
  .map(([statements, picks]) => {
    // Branches lead to the end as often as to another statement.
    const target = (choice: number) =>
      choice % 2 === 0 ? 'done' : `s${((choice - 1) / 2) % statements.length}`;
    const body = statements.map((make, at) => `s${at}: ${make(at, target)}`).join('\n');
    const cases = picks.slice(0, TABLE_ENTRIES).map((choice) => `${target(choice)}-image`);
    const source = `
f: lea ${BASE}, [rip+image]
${body}
done: ret
 .balign 4, 0xcc
table: .long ${cases.join(', ')}
bytes: .rept ${BYTES / 4}
 .byte 0, 1, 2, 7
 .endr
end: .balign 16, 0xcc
callee: mov rax, [${FRAME_POINTER}+0x40]
 mov rcx, rax
 mov rdx, rax
 mov r8, rax
 mov [${FRAME_POINTER}+0x20], rax
 mov [${FRAME_POINTER}+0x28], rax
 cmp rax, 5
 ret
callee_end:`;
    return { source, statements: statements.length };
  });

import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { planDetour } from '../../src/hooks/detour.js';
import { GPR_NAMES, type GprName } from '../../src/x86/registers.js';
import { Arena, type CpuState, differences } from '../handlers/arena.js';
import { createFlatMachine, hexBytes, KERNEL_BASE } from '../machine/support.js';

const machine = createFlatMachine();
afterAll(() => machine.close());

const ARENA_GPA = 0x10_0000n;
const ARENA = KERNEL_BASE + ARENA_GPA;
const FUNCTION = ARENA + 0x100n;
const TRAMPOLINE = ARENA + 0x1203n;
const DATA = ARENA + 0x2000n;
const DATA_SIZE = 0x100;
const STACK = ARENA + 0x3000n;
const STACK_SIZE = 0x1000;
const arena = new Arena(machine, ARENA_GPA, 0x4000, KERNEL_BASE);

/** An instruction that may say something different at each address. */
interface Code {
  readonly text: string;
  readonly encode: (at: bigint) => Buffer;
}

function fixed(text: string, code: string): Code {
  const bytes = hexBytes(code);
  return { text, encode: () => bytes };
}

/** `before`, a displacement to `target`, `behind`. */
function relative(text: string, before: string, target: bigint, behind = ''): Code {
  const [head, tail] = [hexBytes(before), hexBytes(behind)];
  return {
    text: `${text} ${target.toString(16)}`,
    encode: (at) => {
      const displacement = Buffer.alloc(4);
      displacement.writeInt32LE(Number(target - at) - head.length - 4 - tail.length);
      return Buffer.concat([head, displacement, tail]);
    },
  };
}

const hexByte = (value: number) => value.toString(16).padStart(2, '0');
const hexDword = (value: number) => Buffer.from(Int32Array.of(value).buffer).toString('hex');

const gpr = fc.integer({ min: 0, max: 15 }).filter((number) => GPR_NAMES[number] !== 'rsp');
const data = fc.bigInt(DATA, DATA + BigInt(DATA_SIZE) - 8n);
const dword = fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 });
const modrm = (mod: number, reg: number, rm: number) => hexByte((mod << 6) | ((reg & 7) << 3) | (rm & 7));
const rexW = (reg: number, rm: number) => hexByte(0x48 | ((reg >> 3) << 2) | (rm >> 3));

const instruction = fc.oneof(
  gpr.map((r) => fixed(`push ${GPR_NAMES[r]}`, `${hexByte(0x40 | (r >> 3))} ${hexByte(0x50 | (r & 7))}`)),
  fc
    .tuple(gpr, fc.integer({ min: 0, max: 15 }))
    .map(([r, slot]) =>
      fixed('mov [rsp+n], r', `${rexW(r, 4)} 89 ${modrm(1, r, 4)} 24 ${hexByte(slot * 8)}`),
    ),
  fc
    .tuple(gpr, gpr)
    .map(([a, b]) => fixed(`mov ${GPR_NAMES[b]}, ${GPR_NAMES[a]}`, `${rexW(a, b)} 8b ${modrm(3, a, b)}`)),
  fc.tuple(gpr, gpr).map(([a, b]) => fixed('add', `${rexW(a, b)} 01 ${modrm(3, a, b)}`)),
  gpr.map((r) => fixed('mov r, rsp', `${rexW(4, r)} 89 ${modrm(3, 4, r)}`)),
  gpr.map((r) => fixed('sete r', `${rexW(0, r)} 0f94 ${modrm(3, 0, r)}`)),
  fc
    .tuple(gpr, dword)
    .map(([r, value]) => fixed('mov r, imm', `${rexW(0, r)} c7 ${modrm(3, 0, r)} ${hexDword(value)}`)),
  fc.constantFrom(
    fixed('sub rsp, 32', '4883ec20'),
    fixed('lea rsp, [rsp-64]', '488d6424c0'),
    fixed('mov edi, edi', '8bff'),
    fixed('nop', '0f1f4000'),
    fixed('pushfq', '9c'),
    fixed('std', 'fd'),
    fixed('cmc', 'f5'),
    fixed('endbr64', 'f30f1efa'),
    fixed('mov rax, imm64', '48b8 8877665544332211'),
  ),
  fc.tuple(gpr, data).map(([r, at]) => relative('lea r', `${rexW(r, 0)} 8d ${modrm(0, r, 5)}`, at)),
  fc.tuple(gpr, data).map(([r, at]) => relative('mov r,', `${rexW(r, 0)} 8b ${modrm(0, r, 5)}`, at)),
  fc.tuple(gpr, data).map(([r, at]) => relative('xchg r,', `${rexW(r, 0)} 87 ${modrm(0, r, 5)}`, at)),
  data.map((at) => relative('push qword', 'ff35', at)),
  data.map((at) => relative('lock inc dword', 'f0ff05', at)),
  fc.tuple(data, dword).map(([at, value]) => relative('cmp dword', '813d', at, hexDword(value))),
  data.map((at) => relative('mov word', '66c705', at, '3412')),
  data.map((at) => relative('and byte', '8025', at, '0f')),
);

/** Behind the generated instructions, so that there are enough bytes to move. */
const PADDING = fixed('lea rax, [rax+rax+1]', '488d440001');
const RETURN = 0xc3;
/** CF, PF, AF, ZF, SF, OF. */
const ARITHMETIC_FLAGS = 0x8d5n;
const RESERVED_FLAG = 2n;

function assemble(code: readonly Code[]): Buffer {
  let bytes = Buffer.alloc(0);
  for (const each of [...code, PADDING]) {
    bytes = Buffer.concat([bytes, each.encode(FUNCTION + BigInt(bytes.length))]);
  }
  return Buffer.concat([bytes, Buffer.of(RETURN)]);
}

function run(state: CpuState, end: bigint, instructions: number): { after: CpuState; memory: Buffer } {
  arena.enter(state);
  arena.runTo(end, instructions);
  return { after: arena.state(), memory: arena.memory() };
}

/** Compares the hooked function with the function, up to its return; returns what differs. */
function compare(code: readonly Code[], state: CpuState, memory: Uint8Array): string[] {
  const bytes = assemble(code);
  const returnAt = FUNCTION + BigInt(bytes.length) - 1n;
  const limit = code.length + 3;
  const reset = () => {
    arena.write(DATA, memory.subarray(0, DATA_SIZE));
    arena.write(STACK, Buffer.alloc(STACK_SIZE, memory));
    arena.write(FUNCTION, bytes);
  };
  reset();
  const original = run(state, returnAt, limit);

  const plan = planDetour({ gva: FUNCTION, bytes, imageBase: ARENA }, TRAMPOLINE);
  if (plan.refused !== undefined) return [`refused: ${plan.refused}`];
  reset();
  arena.write(plan.trampoline.gva, plan.trampoline.bytes);
  arena.write(plan.entry.gva, plan.entry.bytes);
  const hooked = run(state, returnAt, limit);

  const wrong = differences(original.after, hooked.after);
  for (const { gva, bytes: patch } of [plan.trampoline, plan.entry]) {
    original.memory.set(patch, Number(gva - ARENA));
  }
  if (!hooked.memory.equals(original.memory)) wrong.push('memory');
  return wrong;
}

const u64 = fc.bigInt(0n, (1n << 64n) - 1n);
const start = fc
  .tuple(fc.array(u64, { minLength: 16, maxLength: 16 }), u64, fc.bigInt(STACK + 0x800n, STACK + 0xe00n))
  .map(([values, flags, rsp]) => {
    const registers = Object.fromEntries(GPR_NAMES.map((name, i) => [name, values[i]!]));
    return {
      ...(registers as Record<GprName, bigint>),
      rsp,
      rip: FUNCTION,
      rflags: (flags & ARITHMETIC_FLAGS) | RESERVED_FLAG,
    };
  });
const START = fc.sample(start, { seed: 1, numRuns: 1 })[0]!;
const MEMORY = Uint8Array.from({ length: DATA_SIZE }, (_, i) => i * 5);

describe('a hooked function does what it did: registers, flags and memory, stack included', () => {
  it.each([
    ['a leaf function', [fixed('mov eax, ecx', '8bc1'), fixed('add eax, 5', '83c005')]],
    ['a push, and an adjustment of the stack', [fixed('push rbx', '4053'), fixed('sub rsp, 32', '4883ec20')]],
    ['a save in the home space', [fixed('mov [rsp+8], rbx', '48895c2408')]],
    ['the stack cookie', [fixed('sub rsp, 56', '4883ec38'), relative('mov rax,', '488b05', DATA + 8n)]],
    ['a comparison of a global with an immediate', [relative('cmp dword', '833d', DATA, '00')]],
    ['a global written by a wide immediate', [relative('mov qword', '48c705', DATA + 16n, '78563412')]],
  ])('%s', (_name, code) => {
    expect(compare(code, START, MEMORY)).toEqual([]);
  });

  it('any sequence of instructions, with operands near and far', () => {
    const memory = fc.uint8Array({ minLength: DATA_SIZE, maxLength: DATA_SIZE });
    fc.assert(
      fc.property(fc.array(instruction, { maxLength: 6 }), start, memory, (code, state, bytes) => {
        const wrong = compare(code, state, bytes);
        if (wrong.length > 0) {
          expect.fail(`${code.map(({ text }) => text).join('; ')}: ${wrong.join(', ')}`);
        }
      }),
      { numRuns: 1000 },
    );
  });
});

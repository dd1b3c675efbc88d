// Runs the handler of a load, and the load itself, from the same state.
import fc from 'fast-check';
import { expect } from 'vitest';
import type { Dispatch } from '../../src/handlers/fused.js';
import type { HandlerLayout, HandlerPlan, Refused, TableLoad } from '../../src/handlers/plan.js';
import type { Gva } from '../../src/vmi/address.js';
import { Disassembler, FlowControl, Mnemonic } from '../../src/x86/instruction.js';
import { GPR_NAMES, type GprName } from '../../src/x86/registers.js';
import { createFlatMachine, hexBytes, KERNEL_BASE, setGate } from '../machine/support.js';
import { Arena, type CpuState, differences } from './arena.js';

const ARENA_GPA = 0x10_0000n;
const ARENA_SIZE = 0x8000;

// Offsets in the arena.
const SITE = 0x123n;
const HANDLER = 0x1456n;
const TABLE = 0x5000n;
const STACK = 0x6000n;
const STACK_SIZE = 0x1000n;
const ISR = 0x7000n;

const ISR_VECTOR = 0x41;
/** How far from the table the cases lie. */
const CASES_SIZE = 0x10_0000;

const USABLE = GPR_NAMES.filter((name) => name !== 'rsp');

/** CF, PF, AF, ZF, SF, IF, DF, OF, IOPL, NT, AC and ID: all that POPFQ restores but TF. */
const FLAGS = 0x24_7ed5n;
const IF = 0x200n;
const RESERVED_FLAG = 2n;

const random = {
  gpr: fc.constantFrom(...USABLE),
  flags: fc.bigInt(0n, (1n << 22n) - 1n).map((bits) => (bits & FLAGS) | RESERVED_FLAG),
  values: fc.array(fc.bigInt(0n, (1n << 64n) - 1n), { minLength: 16, maxLength: 16 }),
  rsp: fc.bigInt(STACK + 64n, STACK + STACK_SIZE - 64n),
  // So that the handler, too, can be reached from the base.
  displacement: fc.integer({ min: -(2 ** 31) + ARENA_SIZE, max: 2 ** 31 - 1 - ARENA_SIZE }),
};
const start = fc.record({
  flags: random.flags,
  values: random.values,
  rsp: random.rsp,
  displacement: random.displacement,
});
export const STARTS = fc.sample(start, { seed: 1, numRuns: 50 });

export interface Case {
  readonly dst: GprName;
  readonly idx: GprName;
  readonly base: GprName;
  readonly entries: Uint32Array;
  readonly index: number;
  readonly start: (typeof STARTS)[number];
}

/** False for the only choice that leaves no register for an address without a stack. */
export const hasAddressRegister = ({ dst, idx, base }: Case): boolean => dst !== idx || dst !== base;

/** dst and idx, for tables that are too large to try with every pair. */
export const SOME_PAIRS = [
  ['rcx', 'rax'],
  ['rax', 'rax'],
  ['rbp', 'rbp'],
  ['r12', 'r13'],
  ['r13', 'r13'],
  ['r9', 'rdx'],
] as const;

/** mov dst, dword ptr [base + idx*4 + displacement] */
export function encodeLoad(
  { dst, idx, base }: Pick<Case, 'dst' | 'idx' | 'base'>,
  displacement: number,
): Buffer {
  const [d, x, b] = [dst, idx, base].map((name) => GPR_NAMES.indexOf(name)) as [number, number, number];
  const rex = 0x40 | ((d >> 3) << 2) | ((x >> 3) << 1) | (b >> 3);
  const load = Buffer.from([0x8b, 0x84 | ((d & 7) << 3), 0x80 | ((x & 7) << 3) | (b & 7), 0, 0, 0, 0]);
  load.writeInt32LE(displacement, 3);
  return rex === 0x40 ? load : Buffer.concat([Buffer.of(rex), load]);
}

export interface Prepared {
  readonly test: Case;
  readonly arena: Arena;
  /** What the handler takes the place of. */
  readonly original: Buffer;
  readonly plan: HandlerPlan;
  readonly state: CpuState;
}

export type LayOut = (
  load: TableLoad,
  entries: Uint32Array,
  dispatch: Dispatch,
) => HandlerLayout | Refused<string>;

export interface Form {
  readonly layOut: LayOut;
  /** How many instructions of a block are executed. */
  readonly blockInstructions: number;
  /** The handler does not return behind the load, but goes where the `add` and the `jmp` behind it would have gone. */
  readonly toCase?: boolean;
  /** What the handler may leave in the arena, given what was there; without it, no change at all. */
  memoryAfter?(before: Buffer, prepared: Prepared): Buffer;
}

/** One kind of handler, on a machine of its own. */
export class HandlerRuns {
  readonly #machine = createFlatMachine();
  readonly #arena = new Arena(this.#machine, ARENA_GPA, ARENA_SIZE, KERNEL_BASE);
  /** The same memory below 2 GB, where a load whose base is its index too can reach the table. */
  readonly #lowArena = new Arena(this.#machine, ARENA_GPA, ARENA_SIZE, 0n);

  constructor(private readonly form: Form) {}

  close(): void {
    this.#machine.close();
  }

  /** Compares the handler with the load; returns what differs. */
  compare = (test: Case): string[] => {
    const prepared = this.prepare(test);
    const { arena, plan, state } = prepared;
    const original = this.#runOriginal(prepared);
    arena.write(plan.site.gva, plan.site.bytes);
    const before = arena.memory();
    arena.enter(state);
    arena.step(this.instructionsOf(plan));
    const wrong = differences(original.after, arena.state());
    const expected = this.form.memoryAfter?.(before, prepared) ?? before;
    if (!arena.memory().equals(expected)) wrong.push('memory');
    return wrong;
  };

  /** Runs the handler with something in between, before each of its instructions; returns what differs then. */
  compareInterrupted(test: Case, interrupt: (arena: Arena, step: number) => void): string[] {
    const prepared = this.prepare(test);
    const { arena, plan, state } = prepared;
    const original = this.#runOriginal(prepared);
    arena.write(plan.site.gva, plan.site.bytes);
    arena.enter(state);
    const wrong: string[] = [];
    const handlerEnd = plan.handler.gva + BigInt(plan.handler.bytes.length);
    for (let step = 0; step < this.instructionsOf(plan); step++) {
      interrupt(arena, step);
      const { rip } = arena.state();
      if (step > 0 && (rip < plan.handler.gva || rip >= handlerEnd))
        wrong.push(`RIP outside at step ${step}`);
      arena.step(1);
    }
    wrong.push(...differences(original.after, arena.state()));
    const top = Number(state.rsp - arena.start);
    const stackEnd = Number(STACK + STACK_SIZE);
    const above = (memory: Buffer) => memory.subarray(top, stackEnd);
    if (!above(arena.memory()).equals(above(original.memory))) wrong.push('memory above RSP');
    return wrong;
  }

  /** The same with a real interrupt frame pushed and returned from each time. */
  compareWithRealInterrupts(test: Case): string[] {
    // push rax; pushfq; xor eax, eax; popfq; pop rax; iretq
    const isr = hexBytes('50 9c 33c0 9d 58 48cf');
    let missed = 0;
    const wrong = this.compareInterrupted(
      { ...test, start: { ...test.start, flags: test.start.flags | IF } },
      (arena, step) => {
        if (step === 0) {
          arena.write(arena.start + ISR, isr);
          setGate(this.#machine, ISR_VECTOR, arena.start + ISR);
        }
        const { rip } = arena.state();
        this.#machine.raiseInterrupt(0, ISR_VECTOR);
        arena.step(1);
        if (arena.state().rip === rip) missed++;
        arena.runTo(rip, 5);
      },
    );
    return missed === 0 ? wrong : [...wrong, `${missed} interrupts not taken`];
  }

  /** Takes the vCPU out of the handler before each of its instructions; returns what differs in the end. */
  compareEvacuated = (test: Case): string[] => {
    const prepared = this.prepare(test);
    const { arena, plan, state, original: code } = prepared;
    const original = this.#runOriginal(prepared);
    const wrong: string[] = [];
    // At the site itself it is not inside yet.
    for (let step = 1; step < this.instructionsOf(plan); step++) {
      arena.write(plan.site.gva, plan.site.bytes);
      arena.enter(state);
      arena.step(step);
      arena.write(state.rip, code);
      const registers = this.#machine.registers(0);
      const resumption = plan.evacuation.evacuate(registers);
      if (resumption === undefined || resumption.mustWait) {
        wrong.push(`not possible at step ${step}`);
        continue;
      }
      this.#machine.setRegisters(0, { ...registers, ...resumption.changes });
      arena.runTo(original.after.rip, 2);
      wrong.push(...differences(original.after, arena.state()));
      if (!arena.memory().equals(original.memory)) wrong.push(`memory at step ${step}`);
    }
    return wrong;
  };

  /** How many instructions the handler runs, with the jump at its site. */
  instructionsOf(plan: HandlerPlan): number {
    const code = new Disassembler(plan.handler.bytes, plan.handler.gva);
    try {
      let count = 1;
      for (let at = 0; ; count++) {
        const instruction = code.at(at)!;
        // Padding in front, which the site jumps over.
        if (instruction.mnemonic === Mnemonic.Int3) count--;
        if (instruction.flow === FlowControl.IndirectBranch) return 1 + count + this.form.blockInstructions;
        at += instruction.length;
      }
    } finally {
      code.free();
    }
  }

  prepare(test: Case): Prepared {
    const { dst, idx, base, index } = test;
    const { values, flags, rsp } = test.start;
    const arena = base === idx ? this.#lowArena : this.#arena;
    const gva = arena.start + SITE;
    const table = arena.start + TABLE;
    const disp = this.#displacement(test, table);
    const baseValue = BigInt.asUintN(64, table - BigInt(disp));
    // What is added, where the load overwrites the base.
    const addend = dst === base ? USABLE.find((name) => name !== dst && name !== idx)! : base;
    const state = {
      ...(Object.fromEntries(GPR_NAMES.map((name, i) => [name, values[i]!])) as Record<GprName, bigint>),
      ...(this.form.toCase && { [addend]: baseValue }),
      [base]: baseValue,
      [idx]: BigInt(index),
      rsp: arena.start + rsp,
      rip: gva,
      rflags: flags,
    };
    // Cases near the table, where a jump can go.
    const entries = this.form.toCase
      ? test.entries.map((entry) => disp + (entry % CASES_SIZE))
      : test.entries;
    const load = encodeLoad({ dst, idx, base }, disp);
    const add = encodeAdd(dst, addend);
    const jmp = encodeJumpTo(dst);
    const site = {
      gva,
      length: load.length,
      dst,
      dstBits: 32,
      idx,
      base,
      baseValue,
      addressBits: 64,
    } as const;
    const dispatch = { add, imageBase: baseValue };
    const plan = placed(this.form.layOut(site, entries, dispatch), arena.start + HANDLER);
    arena.write(table, new Uint8Array(entries.buffer, entries.byteOffset, entries.byteLength));
    arena.write(plan.handler.gva, plan.handler.bytes);
    const original = this.form.toCase ? Buffer.concat([load, add, jmp]) : load;
    return { test, arena, original, plan, state };
  }

  #displacement({ base, idx, index, start: { displacement } }: Case, table: Gva): number {
    if (base === idx) return Number(table) - index;
    // An image begins below its cases.
    return this.form.toCase ? Math.abs(displacement) : displacement;
  }

  #runOriginal({ arena, original, state }: Prepared): { after: CpuState; memory: Buffer } {
    arena.write(state.rip, original);
    arena.enter(state);
    arena.step(this.form.toCase ? 3 : 1);
    return { after: arena.state(), memory: arena.memory() };
  }
}

/** add dst, source */
function encodeAdd(dst: GprName, source: GprName): Buffer {
  const [d, s] = [dst, source].map((name) => GPR_NAMES.indexOf(name)) as [number, number];
  return Buffer.from([0x48 | ((d >> 3) << 2) | (s >> 3), 0x03, 0xc0 | ((d & 7) << 3) | (s & 7)]);
}

/** jmp register */
function encodeJumpTo(register: GprName): Buffer {
  const number = GPR_NAMES.indexOf(register);
  return Buffer.from([...(number < 8 ? [] : [0x41]), 0xff, 0xe0 | (number & 7)]);
}

function placed(layout: HandlerLayout | Refused<string>, handler: Gva): HandlerPlan {
  if (layout.refused !== undefined) throw new Error(`refused: ${layout.refused}`);
  const plan = layout.at(handler);
  if (plan.refused !== undefined) throw new Error(`refused: ${plan.refused}`);
  if (plan.handler.bytes.length !== layout.size) throw new Error(`the handler does not have its size`);
  return plan;
}

const describeCase = ({ dst, idx, base, index, entries }: Case) =>
  `dst ${dst}, idx ${idx}, base ${base}, entry ${index} of ${entries.length}`;

/** Runs all cases and expects that none of them differs. */
export function expectNoDifference(cases: Iterable<Case>, differ: (test: Case) => string[]): void {
  for (const test of cases) {
    const wrong = differ(test);
    if (wrong.length > 0) expect.fail(`${describeCase(test)}: ${wrong.join(', ')}`);
  }
}

export function table(size: number): Uint32Array {
  return Uint32Array.from({ length: size }, (_, i) => (0x9e37_79b9 * (i + 1)) >>> 0);
}

export function* everyChoice(): Generator<Case> {
  let n = 0;
  for (const dst of USABLE) {
    for (const idx of USABLE) {
      for (const base of USABLE) {
        const entries = table(16);
        yield { dst, idx, base, entries, index: n % entries.length, start: STARTS[n % STARTS.length]! };
        n++;
      }
    }
  }
}

export function* everyIndex(
  sizes: readonly number[],
  pairs: Iterable<readonly [GprName, GprName]>,
): Generator<Case> {
  for (const [dst, idx] of pairs) {
    for (const size of sizes) {
      for (let index = 0; index < size; index++) {
        const base = idx === 'rbp' ? 'r13' : 'rbp';
        yield { dst, idx, base, entries: table(size), index, start: STARTS[index % STARTS.length]! };
      }
    }
  }
}

/** Any registers, flags, stack, displacement and entries. */
export const anyCase: fc.Arbitrary<Case> = fc
  .record({
    dst: random.gpr,
    idx: random.gpr,
    base: random.gpr,
    entries: fc.uint32Array({ minLength: 1, maxLength: 256 }),
    start,
    pick: fc.nat(),
  })
  .map(({ pick, ...rest }) => ({ ...rest, index: pick % rest.entries.length }));

/** What an interrupt may do to the stack. */
export function overwriteBelowStack(arena: Arena): void {
  const stack = arena.start + STACK;
  arena.write(stack, Buffer.alloc(Number(arena.state().rsp - stack), 0xa5));
}

export const everyPair = USABLE.flatMap((dst) => USABLE.map((idx) => [dst, idx] as const));

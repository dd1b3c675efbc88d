// Runs a handler, and the code that it stands in for, from the same state.
import fc from 'fast-check';
import { afterEach, expect } from 'vitest';
import type { StoppedThread } from '../../src/handlers/evacuation.js';
import type { HandlerLayout, HandlerPlan, LoadSite, Refused } from '../../src/handlers/plan.js';
import type { WholeSwitch } from '../../src/handlers/replaced.js';
import type { Liveness } from '../../src/switches/liveness.js';
import type { Gva } from '../../src/vmi/address.js';
import { GPR_NAMES, type GprName } from '../../src/x86/registers.js';
import { createFlatMachine, hexBytes, KERNEL_BASE, setGate } from '../machine/support.js';
import { Arena, type CpuState, differences } from './arena.js';

// These tests compute for long: in between, the runner has to hear of them.
afterEach(() => new Promise((resolve) => setImmediate(resolve)));

const ARENA_GPA = 0x10_0000n;
const ARENA_SIZE = 0x8000;

// Offsets in the arena.
const SITE = 0x123n;
const HANDLER = 0x1456n;
const TABLE = 0x5000n;
const BYTE_TABLE = 0x5800n;
const STACK = 0x6000n;
const STACK_SIZE = 0x1000n;
const ISR = 0x7000n;

const ISR_VECTOR = 0x41;
/** More instructions than any handler executes. */
const MOST_INSTRUCTIONS = 24;
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
  /** Of the dword load. */
  readonly idx: GprName;
  readonly base: GprName;
  readonly entries: Uint32Array;
  /** Of the two-level form: the load in front that brings `idx`. */
  readonly byte?: { readonly idx: GprName; readonly values: Uint8Array };
  /** What the first load is executed with. */
  readonly index: number;
  readonly start: (typeof STARTS)[number];
}

/** dst and idx, for tables that are too large to try with every pair. */
export const SOME_PAIRS = [
  ['rcx', 'rax'],
  ['rax', 'rax'],
  ['rbp', 'rbp'],
  ['r12', 'r13'],
  ['r13', 'r13'],
  ['r9', 'rdx'],
] as const;

/** What comes in a trap frame, as far as it is the same for every register that a handler may use. */
const TRAP_FRAME = ['rax', 'rcx', 'rdx', 'rbp', 'r8', 'r9', 'r10', 'r11', 'rip', 'rsp'] as const;

export function isInFrame(name: GprName): boolean {
  return (TRAP_FRAME as readonly string[]).includes(name);
}

function number(name: GprName): number {
  return GPR_NAMES.indexOf(name);
}

/** An operand `[base + idx*scale + displacement]`, with a register beside it. */
function encodeMemory(
  opcode: readonly number[],
  reg: GprName,
  { idx, base }: { readonly idx: GprName; readonly base: GprName },
  scaleBits: number,
  displacement: number,
): Buffer {
  const [r, x, b] = [number(reg), number(idx), number(base)];
  const rex = 0x40 | ((r >> 3) << 2) | ((x >> 3) << 1) | (b >> 3);
  const sib = (scaleBits << 6) | ((x & 7) << 3) | (b & 7);
  const disp = Buffer.alloc(4);
  disp.writeInt32LE(displacement);
  return Buffer.from([...(rex === 0x40 ? [] : [rex]), ...opcode, 0x84 | ((r & 7) << 3), sib, ...disp]);
}

/** mov dst, dword ptr [base + idx*4 + displacement] */
export function encodeLoad(
  { dst, idx, base }: Pick<Case, 'dst' | 'idx' | 'base'>,
  displacement: number,
): Buffer {
  return encodeMemory([0x8b], dst, { idx, base }, 2, displacement);
}

/** The code of a case, and what an encoder is told of it. */
export interface GuestCode {
  readonly load: LoadSite;
  readonly entries: Uint32Array;
  readonly whole: WholeSwitch;
  /** Where the table of the first load begins, from the base on. */
  readonly table: number;
}

export interface Prepared {
  readonly test: Case;
  readonly arena: Arena;
  /** The whole switch. */
  readonly original: Buffer;
  readonly plan: HandlerPlan;
  readonly state: CpuState;
}

export interface Form {
  layOut(code: GuestCode): HandlerLayout | Refused<string>;
  /** What the handler stands in for: where it ends is compared. `loads`: both of the two-level form. */
  readonly replaces: 'load' | 'loads' | 'switch';
  /** What the code at a case needs. */
  readonly live?: Liveness | undefined;
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

  /** Why there is no handler for this case. */
  refusal(test: Case): string | undefined {
    return this.form.layOut(this.#guestCode(test).code).refused;
  }

  isPossible = (test: Case): boolean => this.refusal(test) === undefined;

  /** Compares the handler with what it stands in for; returns what differs. */
  compare = (test: Case): string[] => {
    const prepared = this.prepare(test);
    const { arena, plan, state } = prepared;
    const original = this.#runOriginal(prepared);
    arena.write(plan.site.gva, plan.site.bytes);
    const before = arena.memory();
    arena.enter(state);
    arena.runTo(original.after.rip, MOST_INSTRUCTIONS);
    const wrong = this.#differences(original.after, arena.state());
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
    for (let step = 0; arena.state().rip !== original.after.rip; step++) {
      interrupt(arena, step);
      const { rip } = arena.state();
      if (!contains(plan.handler, rip) && !contains(plan.site, rip) && !isLeft(prepared, rip)) {
        return [`RIP outside at step ${step}`];
      }
      arena.step(1);
    }
    wrong.push(...this.#differences(original.after, arena.state()));
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

  /** Takes a vCPU, and a thread, out of the handler before each of its instructions; returns what differs in the end. */
  compareEvacuated = (test: Case): string[] => {
    const prepared = this.prepare(test);
    const { arena, plan, state, original: code } = prepared;
    const original = this.#runOriginal(prepared);
    const wrong: string[] = [];
    // At the site itself it is not inside yet.
    for (let step = 1; ; step++) {
      arena.write(plan.site.gva, plan.site.bytes);
      arena.enter(state);
      arena.step(step);
      const registers = this.#machine.registers(0);
      if (registers.rip === original.after.rip) return step === 1 ? ['never inside'] : wrong;
      if (isLeft(prepared, registers.rip)) continue;
      arena.write(state.rip, code);
      const inFrame: StoppedThread = {
        rip: registers.rip,
        ...Object.fromEntries(TRAP_FRAME.map((name) => [name, registers[name]])),
      };
      for (const known of [registers, inFrame]) {
        const resumption = plan.evacuation.evacuate(known);
        if (resumption === undefined || resumption.mustWait) {
          wrong.push(`not possible at step ${step}`);
          continue;
        }
        const lost = Object.keys(resumption.changes).filter((name) => !(name in known));
        if (lost.length > 0) wrong.push(`${lost} cannot be set at step ${step}`);
        this.#machine.setRegisters(0, { ...registers, ...resumption.changes });
        arena.runTo(original.after.rip, MOST_INSTRUCTIONS);
        // Whatever is not needed: it goes through the guest's own code.
        wrong.push(...differences(original.after, arena.state()).map((what) => `${what} at step ${step}`));
        if (!arena.memory().equals(original.memory)) wrong.push(`memory at step ${step}`);
      }
    }
  };

  prepare(test: Case): Prepared {
    const { arena, code, original, state, tables } = this.#guestCode(test);
    const plan = placed(this.form.layOut(code), arena.start + HANDLER);
    for (const { gva, bytes } of tables) arena.write(gva, bytes);
    arena.write(plan.handler.gva, plan.handler.bytes);
    return { test, arena, original, plan, state };
  }

  #guestCode(test: Case) {
    const { dst, idx, base, byte, index } = test;
    const { values, flags, rsp } = test.start;
    const arena = base === idx ? this.#lowArena : this.#arena;
    const gva = arena.start + SITE;
    const table = arena.start + TABLE;
    const disp = this.#displacement(test, table);
    const baseValue = BigInt.asUintN(64, table - BigInt(disp));
    const firstIdx = byte?.idx ?? idx;
    // What is added, where the load overwrites the base.
    const addend = dst === base ? USABLE.find((name) => ![dst, idx, firstIdx].includes(name))! : base;
    const state = {
      ...(Object.fromEntries(GPR_NAMES.map((name, i) => [name, values[i]!])) as Record<GprName, bigint>),
      ...(this.form.replaces === 'switch' && { [addend]: baseValue }),
      [base]: baseValue,
      [firstIdx]: BigInt(index),
      rsp: arena.start + rsp,
      rip: gva,
      rflags: flags,
    };
    // Cases near the table, where a jump can go.
    const entries =
      this.form.replaces === 'switch'
        ? test.entries.map((entry) => disp + (entry % CASES_SIZE))
        : test.entries;
    const movzx = [0x0f, 0xb6];
    const byteDisp = disp + Number(BYTE_TABLE - TABLE);
    const byteLoad =
      byte === undefined ? Buffer.of() : encodeMemory(movzx, idx, { idx: byte.idx, base }, 0, byteDisp);
    const load = encodeLoad(test, disp);
    const [add, jmp] = [encodeAdd(dst, addend), encodeJumpTo(dst)];
    const site = (at: Gva, bytes: Buffer, to: GprName, by: GprName): LoadSite => ({
      ...{ gva: at, length: bytes.length, dst: to, idx: by },
      ...{ dstBits: 32, base, baseValue, addressBits: 64 },
    });
    const dwordSite = site(gva + BigInt(byteLoad.length), load, dst, idx);
    const code: GuestCode = {
      load: dwordSite,
      entries,
      table: byte === undefined ? disp : byteDisp,
      whole: {
        load: dwordSite,
        entries,
        ...(byte && { byteLoad: { load: site(gva, byteLoad, idx, byte.idx), entries: byte.values } }),
        add,
        jmpLength: jmp.length,
        liveAt: () => this.form.live,
      },
    };
    const tables = [
      { gva: table, bytes: new Uint8Array(entries.buffer, entries.byteOffset, entries.byteLength) },
      { gva: arena.start + BYTE_TABLE, bytes: byte?.values ?? Buffer.of() },
    ];
    return { arena, code, state, tables, original: Buffer.concat([byteLoad, load, add, jmp]) };
  }

  #displacement({ base, idx, index, start: { displacement } }: Case, table: Gva): number {
    if (base === idx) return Number(table) - index;
    // An image begins below its cases.
    return this.form.replaces === 'switch' ? Math.abs(displacement) : displacement;
  }

  #runOriginal({ arena, original, state, test }: Prepared): { after: CpuState; memory: Buffer } {
    arena.write(state.rip, original);
    arena.enter(state);
    arena.step({ load: 1, loads: 2, switch: test.byte === undefined ? 3 : 4 }[this.form.replaces]);
    return { after: arena.state(), memory: arena.memory() };
  }

  /** Of what the code that comes next needs. */
  #differences(before: CpuState, after: CpuState): string[] {
    const { live } = this.form;
    if (live === undefined) return differences(before, after);
    const state = { ...after };
    for (const name of GPR_NAMES) if (!live.registers.has(name)) state[name] = before[name];
    if (!live.flags) state.rflags = before.rflags;
    return differences(before, state);
  }
}

/** Whether the thread goes on in what is left of the guest's own code. */
function isLeft({ plan: { site }, original }: Prepared, rip: Gva): boolean {
  return rip >= site.gva + BigInt(site.bytes.length) && rip < site.gva + BigInt(original.length);
}

function contains({ gva, bytes }: { readonly gva: Gva; readonly bytes: Buffer }, rip: Gva): boolean {
  return rip >= gva && rip < gva + BigInt(bytes.length);
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

const describeCase = ({ dst, idx, base, index, entries, byte }: Case) =>
  `dst ${dst}, idx ${idx}, base ${base}, byte idx ${byte?.idx}, index ${index} of ${entries.length}`;

/** Runs all cases and expects that none of them differs. */
export function expectNoDifference(cases: Iterable<Case>, differ: (test: Case) => string[]): void {
  let count = 0;
  for (const test of cases) {
    const wrong = differ(test);
    if (wrong.length > 0) expect.fail(`${describeCase(test)}: ${wrong.join(', ')}`);
    count++;
  }
  expect(count).toBeGreaterThan(0);
}

export function table(size: number): Uint32Array {
  return Uint32Array.from({ length: size }, (_, i) => (0x9e37_79b9 * (i + 1)) >>> 0);
}

/** One for each way in which an encoding or a calling convention treats registers. */
const KINDS = ['rax', 'rdx', 'rbx', 'rbp', 'r8', 'r12', 'r13'] as const;
const FEW_ENTRIES = 5;

export function* everyChoice(registers: readonly GprName[] = USABLE): Generator<Case> {
  const entries = table(FEW_ENTRIES);
  let n = 0;
  for (const dst of registers) {
    for (const idx of registers) {
      for (const base of registers) {
        yield { dst, idx, base, entries, index: n % entries.length, start: STARTS[n % STARTS.length]! };
        n++;
      }
    }
  }
}

/** Every choice among registers of each kind. */
export const everyKind = (): Generator<Case> => everyChoice(KINDS);

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
export const everyPairOfKinds = KINDS.flatMap((dst) => KINDS.map((idx) => [dst, idx] as const));

/** As a byte table is: most indices lead to the same. */
function byteTable(size: number, values: number): Uint8Array {
  return Uint8Array.from({ length: size }, (_, i) => (i % 3 === 0 ? (i * 7) % values : 0));
}

export function* everyTwoLevelKind(): Generator<Case> {
  const [entries, values] = [table(FEW_ENTRIES), byteTable(20, FEW_ENTRIES)];
  let n = 0;
  for (const dst of KINDS) {
    for (const idx of KINDS) {
      for (const byteIdx of KINDS) {
        for (const base of KINDS.filter((name) => name !== idx && name !== byteIdx)) {
          const start = STARTS[n % STARTS.length]!;
          yield { dst, idx, base, entries, byte: { idx: byteIdx, values }, index: n % values.length, start };
          n++;
        }
      }
    }
  }
}

/** Every index of byte tables of some sizes, for each way in which registers may be the same. */
export function* everyByteIndex(sizes: readonly number[]): Generator<Case> {
  const registers = [
    ['rcx', 'rax', 'rax'],
    ['rax', 'rax', 'rax'],
    ['rax', 'rcx', 'rax'],
    ['r12', 'r13', 'rbp'],
    ['rbx', 'rsi', 'rdi'],
    ['r9', 'r9', 'r8'],
  ] as const;
  for (const [dst, idx, byteIdx] of registers) {
    for (const size of sizes) {
      const values = byteTable(size, Math.min(size, FEW_ENTRIES));
      for (let index = 0; index < size; index++) {
        const start = STARTS[index % STARTS.length]!;
        yield {
          dst,
          idx,
          base: 'rdx',
          entries: table(FEW_ENTRIES),
          byte: { idx: byteIdx, values },
          index,
          start,
        };
      }
    }
  }
}

export const anyTwoLevelCase: fc.Arbitrary<Case> = fc
  .record({
    dst: random.gpr,
    idx: random.gpr,
    byteIdx: random.gpr,
    base: random.gpr,
    entries: fc.uint32Array({ minLength: 1, maxLength: 256 }),
    bytes: fc.uint8Array({ minLength: 1, maxLength: 256 }),
    start,
    pick: fc.nat(),
  })
  .filter(({ idx, byteIdx, base }) => base !== idx && base !== byteIdx)
  .map(({ pick, bytes, byteIdx, ...rest }) => {
    const values = bytes.map((byte) => byte % rest.entries.length);
    return { ...rest, byte: { idx: byteIdx, values }, index: pick % values.length };
  });

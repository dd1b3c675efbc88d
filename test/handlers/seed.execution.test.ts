import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import type { HandlerPlan, TableLoad } from '../../src/handlers/plan.js';
import { planSeedHandler, SEED_STACK_BYTES } from '../../src/handlers/seed.js';
import { GPR_NAMES, type GprName } from '../../src/x86/registers.js';
import { createFlatMachine, hexBytes, KERNEL_BASE, setGate } from '../machine/support.js';
import { Arena, type CpuState, differences } from './arena.js';

const machine = createFlatMachine();
afterAll(() => machine.close());

const ARENA_GPA = 0x10_0000n;
const ARENA_SIZE = 0x6000;
const arena = new Arena(machine, ARENA_GPA, ARENA_SIZE, KERNEL_BASE);
/** The same memory below 2 GB, where a load whose base is its index too can reach the table. */
const lowArena = new Arena(machine, ARENA_GPA, ARENA_SIZE, 0n);

// Offsets in the arena.
const SITE = 0x123n;
const HANDLER = 0x1456n;
const TABLE = 0x3000n;
const STACK = 0x4000n;
const STACK_SIZE = 0x1000n;
const ISR = 0x5000n;

/** jmp; 11 up to jmp dst; mov; jmp */
const HANDLER_INSTRUCTIONS = 15;
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
  displacement: fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 }),
};
const start = fc.record({
  flags: random.flags,
  values: random.values,
  rsp: random.rsp,
  displacement: random.displacement,
});
const STARTS = fc.sample(start, { seed: 1, numRuns: 50 });

interface Case {
  readonly dst: GprName;
  readonly idx: GprName;
  readonly base: GprName;
  readonly entries: Uint32Array;
  readonly index: number;
  readonly start: (typeof STARTS)[number];
}

/** mov dst, dword ptr [base + idx*4 + displacement] */
function encodeLoad({ dst, idx, base }: Pick<Case, 'dst' | 'idx' | 'base'>, displacement: number): Buffer {
  const [d, x, b] = [dst, idx, base].map((name) => GPR_NAMES.indexOf(name)) as [number, number, number];
  const rex = 0x40 | ((d >> 3) << 2) | ((x >> 3) << 1) | (b >> 3);
  const load = Buffer.from([0x8b, 0x84 | ((d & 7) << 3), 0x80 | ((x & 7) << 3) | (b & 7), 0, 0, 0, 0]);
  load.writeInt32LE(displacement, 3);
  return rex === 0x40 ? load : Buffer.concat([Buffer.of(rex), load]);
}

interface Prepared {
  readonly arena: Arena;
  readonly load: Buffer;
  readonly plan: HandlerPlan;
  readonly state: CpuState;
}

function prepare({
  dst,
  idx,
  base,
  entries,
  index,
  start: { values, flags, rsp, displacement },
}: Case): Prepared {
  const home = base === idx ? lowArena : arena;
  const gva = home.start + SITE;
  const table = home.start + TABLE;
  const disp = base === idx ? Number(table) - index : displacement;
  const state = {
    ...(Object.fromEntries(GPR_NAMES.map((name, i) => [name, values[i]!])) as Record<GprName, bigint>),
    [base]: BigInt.asUintN(64, table - BigInt(disp)),
    [idx]: BigInt(index),
    rsp: home.start + rsp,
    rip: gva,
    rflags: flags,
  };
  const load = encodeLoad({ dst, idx, base }, disp);
  const site: TableLoad = { gva, length: load.length, dst, dstBits: 32, idx, base, addressBits: 64 };
  const plan = planSeedHandler(site, entries, home.start + HANDLER);
  if (plan.refused !== undefined) throw new Error(`refused: ${plan.refused}`);
  home.write(table, new Uint8Array(entries.buffer, entries.byteOffset, entries.byteLength));
  home.write(plan.handler.gva, plan.handler.bytes);
  return { arena: home, load, plan, state };
}

function runOriginal({ arena, load, state }: Prepared): { after: CpuState; memory: Buffer } {
  arena.write(state.rip, load);
  arena.enter(state);
  arena.step(1);
  return { after: arena.state(), memory: arena.memory() };
}

/** What the handler leaves on the stack: the index, zero where a pointer to it was, the flags. */
function expectedMemory(before: Buffer, { arena, state }: Prepared, idx: GprName): Buffer {
  const expected = Buffer.from(before);
  const top = Number(state.rsp - arena.start);
  expected.writeBigUInt64LE(state[idx], top - SEED_STACK_BYTES);
  expected.writeBigUInt64LE(0n, top - 16);
  expected.writeBigUInt64LE(state.rflags, top - 8);
  return expected;
}

/** Compares the handler with the load; returns what differs. */
function compare(test: Case): string[] {
  const prepared = prepare(test);
  const { arena, plan, state } = prepared;
  const original = runOriginal(prepared);
  arena.write(plan.site.gva, plan.site.bytes);
  const before = arena.memory();
  arena.enter(state);
  arena.step(HANDLER_INSTRUCTIONS);
  const wrong = differences(original.after, arena.state());
  if (!arena.memory().equals(expectedMemory(before, prepared, test.idx))) wrong.push('memory');
  if (plan.back !== original.after.rip) wrong.push('back');
  return wrong;
}

const describeCase = ({ dst, idx, base, index, entries }: Case) =>
  `dst ${dst}, idx ${idx}, base ${base}, entry ${index} of ${entries.length}`;

/** Runs all cases and expects that none of them differs. */
function expectNoDifference(cases: Iterable<Case>, differ: (test: Case) => string[]): void {
  for (const test of cases) {
    const wrong = differ(test);
    if (wrong.length > 0) expect.fail(`${describeCase(test)}: ${wrong.join(', ')}`);
  }
}

function table(size: number): Uint32Array {
  return Uint32Array.from({ length: size }, (_, i) => (0x9e37_79b9 * (i + 1)) >>> 0);
}

function* everyChoice(): Generator<Case> {
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

function* everyIndex(
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

const everyPair = USABLE.flatMap((dst) => USABLE.map((idx) => [dst, idx] as const));

describe('the seed handler does what the load did: registers, flags, RIP, and memory but for its stack slots', () => {
  it('for every choice of dst, idx and base, equal ones included', () => {
    expectNoDifference(everyChoice(), compare);
  });

  it('for every dst, idx and index of small tables', () => {
    expectNoDifference(everyIndex([1, 2, 16], everyPair), compare);
  });

  it('for every index of the largest table', () => {
    const pairs = [
      ['rcx', 'rax'],
      ['rax', 'rax'],
      ['r12', 'r13'],
      ['r9', 'rdx'],
    ] as const;
    expectNoDifference(everyIndex([256], pairs), compare);
  });

  it('for any registers, flags, stack, displacement and entries', () => {
    const entries = fc.uint32Array({ minLength: 1, maxLength: 256 });
    const anyCase = fc
      .record({ dst: random.gpr, idx: random.gpr, base: random.gpr, entries, start, pick: fc.nat() })
      .map(({ pick, ...rest }) => ({ ...rest, index: pick % rest.entries.length }));
    fc.assert(
      fc.property(anyCase, (test) => expectNoDifference([test], compare)),
      { numRuns: 1000 },
    );
  });

  it('for a byte table, whose bytes are its entries', () => {
    const entries = Uint32Array.from({ length: 200 }, (_, i) => (i * 7) & 0xff);
    expectNoDifference(
      [{ dst: 'rcx', idx: 'rax', base: 'rdx', entries, index: 77, start: STARTS[0]! }],
      compare,
    );
  });
});

describe('an interrupt at any instruction boundary of the seed handler', () => {
  /** Runs the handler with `interrupt` before each of its instructions; returns what differs from the load. */
  function compareInterrupted(test: Case, interrupt: (arena: Arena) => void): string[] {
    const prepared = prepare(test);
    const { arena, plan, state } = prepared;
    const original = runOriginal(prepared);
    arena.write(plan.site.gva, plan.site.bytes);
    arena.enter(state);
    const wrong: string[] = [];
    const handlerEnd = plan.handler.gva + BigInt(plan.handler.bytes.length);
    for (let step = 0; step < HANDLER_INSTRUCTIONS; step++) {
      interrupt(arena);
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

  it('is harmless, with all of the stack below RSP overwritten each time', () => {
    const overwrite = (arena: Arena) => {
      const stack = arena.start + STACK;
      arena.write(stack, Buffer.alloc(Number(arena.state().rsp - stack), 0xa5));
    };
    expectNoDifference(everyIndex([3], everyPair), (test) => compareInterrupted(test, overwrite));
  });

  it('is harmless, with a real frame pushed and returned from each time', () => {
    const vector = 0x41;
    // push rax; pushfq; xor eax, eax; popfq; pop rax; iretq
    const isr = hexBytes('50 9c 33c0 9d 58 48cf');
    arena.write(arena.start + ISR, isr);
    setGate(machine, vector, arena.start + ISR);
    let interrupts = 0;
    const raise = (arena: Arena) => {
      const { rip } = arena.state();
      machine.raiseInterrupt(0, vector);
      arena.step(1);
      if (arena.state().rip !== rip) interrupts++;
      arena.runTo(rip, 5);
    };
    const cases = [...everyIndex([3], everyPair)].map((test) => ({
      ...test,
      start: { ...test.start, flags: test.start.flags | IF },
    }));
    expectNoDifference(cases, (test) => compareInterrupted(test, raise));
    expect(interrupts).toBe(cases.length * HANDLER_INSTRUCTIONS);
  });
});

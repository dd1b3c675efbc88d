import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { AGENT_VECTOR, type AgentRegion, agentRegion } from '../../src/handlers/agent.js';
import type { LoadSite, Patch } from '../../src/handlers/plan.js';
import type { Gva } from '../../src/vmi/address.js';
import { GPR_NAMES, type GprName } from '../../src/x86/registers.js';
import { createFlatMachine, hexBytes, KERNEL_BASE, setGate } from '../machine/support.js';
import { Arena, type CpuState, differences } from './arena.js';
import {
  anyCase,
  type Case,
  encodeLoad,
  everyChoice,
  everyIndex,
  everyPair,
  expectNoDifference,
  SOME_PAIRS,
  STARTS,
  table,
} from './execution.js';

// Offsets in the arena.
const SITES = 0x123n;
const CHAIN = 0x800n;
const ISR = 0x900n;
const REGION = 0x1456n;
const TABLE = 0x7000n;
const STACK = 0x8000n;
const STACK_SIZE = 0x1000n;
const ARENA_SIZE = 0x9000;
const REGION_SIZE = Number(TABLE - REGION);

const ISR_VECTOR = 0x41;
const IF = 0x200n;
const TRAP_GATE = 0x8f;
const GATE_SIZE = 16n;
const GATE_TYPE = 5n;
/** Of dispatcher and handler, with some pairs in a bucket. */
const MOST_INSTRUCTIONS = 100;
/** Loads that are this far apart fall into one bucket. */
const BUCKETS = 64n;

const machine = createFlatMachine();
afterAll(() => machine.close());
const arenaAt = (mappedAt: Gva) => new Arena(machine, 0x10_0000n, ARENA_SIZE, mappedAt);
const high = arenaAt(KERNEL_BASE);
/** The same memory below 2 GB, where a load whose base is its index too can reach the table. */
const low = arenaAt(0n);

interface Prepared {
  readonly arena: Arena;
  readonly original: Buffer;
  readonly load: LoadSite;
  readonly state: CpuState;
}

/** @param interruptible whether interrupts stay allowed in dispatcher and handler */
function enterAt(dispatcher: Gva, interruptible: boolean): void {
  setGate(machine, AGENT_VECTOR, dispatcher);
  if (!interruptible) return;
  const gate = machine.registers(0).idtrBase - KERNEL_BASE + BigInt(AGENT_VECTOR) * GATE_SIZE;
  machine.writePhysical(gate + GATE_TYPE, Buffer.of(TRAP_GATE));
}

function prepare({ dst, idx, base, index, entries, start }: Case, site = SITES): Prepared {
  const arena = base === idx ? low : high;
  const gva = arena.start + site;
  const tableAt = arena.start + TABLE;
  const displacement = base === idx ? Number(tableAt) - index : start.displacement;
  const original = encodeLoad({ dst, idx, base }, displacement);
  const baseValue = BigInt.asUintN(64, tableAt - BigInt(displacement));
  const state = {
    ...(Object.fromEntries(GPR_NAMES.map((name, i) => [name, start.values[i]!])) as Record<GprName, bigint>),
    [base]: baseValue,
    [idx]: BigInt(index),
    rsp: arena.start + STACK + (start.rsp % (STACK_SIZE / 2n)) + STACK_SIZE / 2n,
    rip: gva,
    rflags: start.flags,
  };
  arena.write(tableAt, new Uint8Array(entries.buffer, entries.byteOffset, entries.byteLength));
  arena.write(gva, original);
  const registers = { dst, idx, base, baseValue, dstBits: 32, addressBits: 64 } as const;
  return { arena, original, load: { gva, length: original.length, ...registers }, state };
}

function laidOut(cases: readonly { load: LoadSite; entries: Uint32Array }[], chain?: Gva): AgentRegion {
  const gva = cases[0]!.load.gva - SITES + REGION;
  const region = agentRegion(cases, { gva, size: REGION_SIZE }, chain);
  if (region.refused !== undefined) throw new Error(`refused: ${region.refused}`);
  return region;
}

function write(arena: Arena, ...patches: readonly Patch[]): void {
  for (const { gva, bytes } of patches) arena.write(gva, bytes);
}

/** Memory but for the dead stack, where interrupt frames lie. */
function live(arena: Arena, { rsp }: CpuState): Buffer {
  const memory = arena.memory();
  return memory.fill(0, Number(STACK), Number(rsp - arena.start));
}

/** Runs the load and its handler; returns what differs. `meanwhile` is called in front of every instruction. */
function differ(test: Case, interruptible = false, meanwhile?: (arena: Arena) => void): string[] {
  const { arena, load, state } = prepare(test);
  arena.enter(state);
  arena.step(1);
  const expected = arena.state();
  const { region, dispatcher, relocations } = laidOut([{ load, entries: test.entries }]);
  write(arena, region, relocations[0]!.site);
  enterAt(dispatcher, interruptible);
  const before = live(arena, state);
  arena.enter(state);
  let steps = 0;
  for (; arena.state().rip !== expected.rip && steps < MOST_INSTRUCTIONS; steps++) {
    meanwhile?.(arena);
    arena.step(1);
  }
  const wrong = differences(expected, arena.state());
  if (!live(arena, state).equals(before)) wrong.push('memory above RSP');
  return wrong;
}

describe('the agent form does what the load did: registers, flags, RIP, and memory but for the dead stack', () => {
  it('for every choice of dst, idx and base, equal ones included', () => {
    expectNoDifference(everyChoice(), differ);
  });

  it('for every dst, idx and index of small tables', () => {
    expectNoDifference(everyIndex([1, 2, 5], everyPair), differ);
  });

  it('for every index of the largest table', () => {
    expectNoDifference(everyIndex([256], SOME_PAIRS), differ);
  });

  it('for any registers, flags, stack, displacement and entries', () => {
    fc.assert(
      fc.property(anyCase, (test) => expectNoDifference([test], differ)),
      { numRuns: 500 },
    );
  });
});

describe('an interrupt at any instruction boundary, from the site to the end of the handler', () => {
  it('is harmless, with all of the stack below RSP overwritten each time', () => {
    expectNoDifference(everyIndex([3], everyPair), (test) =>
      differ(test, false, (arena) => {
        const stack = arena.start + STACK;
        arena.write(stack, Buffer.alloc(Number(arena.state().rsp - stack), 0xa5));
      }),
    );
  });

  it('is harmless behind a trap gate, with a real frame pushed and returned from each time', () => {
    // push rax; pushfq; xor eax, eax; popfq; pop rax; iretq
    const isr = hexBytes('50 9c 33c0 9d 58 48cf');
    for (const arena of [high, low]) arena.write(arena.start + ISR, isr);
    let missed = 0;
    expectNoDifference(everyIndex([3], everyPair), (test) => {
      const start = { ...test.start, flags: test.start.flags | IF };
      return differ({ ...test, start }, true, (arena) => {
        setGate(machine, ISR_VECTOR, arena.start + ISR);
        const { rip } = arena.state();
        machine.raiseInterrupt(0, ISR_VECTOR);
        arena.step(1);
        if (arena.state().rip === rip) missed++;
        arena.runTo(rip, 5);
      });
    });
    expect(missed).toBe(0);
  });
});

describe('a region of many loads', () => {
  const CASE: Case = { dst: 'rcx', idx: 'rax', base: 'rdx', entries: table(3), index: 1, start: STARTS[0]! };
  /** Every second one in the same bucket, the others each in another. */
  const SITES_OF_MANY = Array.from({ length: 20 }, (_, n) =>
    n % 2 === 0 ? SITES + BigInt(n) * BUCKETS : SITES + BigInt(n) * (BUCKETS + 1n),
  );

  function many(chain?: Gva) {
    const cases = SITES_OF_MANY.map((site, n) => {
      const entries = Uint32Array.of(n, 0x100 + n, 0x200 + n);
      return { ...prepare({ ...CASE, entries }, site), entries };
    });
    const region = laidOut(cases, chain);
    enterAt(region.dispatcher, false);
    write(high, region.region, ...region.relocations.map(({ site }) => site));
    return { cases, region };
  }

  /** Runs until RIP is `end`; calls `look` at each boundary on the way. */
  function run(state: CpuState, end: Gva, look?: (rip: Gva) => void): CpuState {
    high.enter(state);
    for (let steps = 0; high.state().rip !== end; steps++) {
      if (steps === MOST_INSTRUCTIONS) throw new Error('does not come to an end');
      high.step(1);
      look?.(high.state().rip);
    }
    return high.state();
  }

  const end = ({ load }: Prepared) => load.gva + BigInt(load.length);

  it('leads each to its own handler, where return addresses share a bucket too', () => {
    const { cases } = many();
    for (const prepared of cases) {
      const after = run(prepared.state, end(prepared));
      expect(differences({ ...prepared.state, rcx: BigInt(prepared.entries[1]!) }, after)).toEqual([
        expect.stringMatching(/^rip/),
      ]);
    }
  });

  it.each([
    ['from where the return address shares the bucket of ten', SITES + 5n],
    ['from where its bucket is empty', SITES],
  ])('sends an INT 20 of somebody else to the chain, %s: registers and frame as they were', (_, site) => {
    const chain = high.start + CHAIN;
    many(chain);
    const { state } = prepare(CASE, site + 0x40n * BUCKETS);
    high.write(state.rip, hexBytes('cd14'));
    setGate(machine, AGENT_VECTOR, chain);
    const expected = run(state, chain);
    const frame = high.memory().subarray(Number(expected.rsp - high.start));
    const { region } = many(chain);
    high.write(state.rip, hexBytes('cd14'));
    enterAt(region.dispatcher, false);
    const after = run(state, chain);
    // Flags are in the frame.
    expect(differences({ ...expected, rflags: after.rflags }, after)).toEqual([]);
    expect(
      high
        .memory()
        .subarray(Number(after.rsp - high.start))
        .compare(frame),
    ).toBe(0);
  });

  it('without a chain, returns from an INT 20 of somebody else, and changes nothing', () => {
    many();
    const { state } = prepare(CASE, SITES + 5n + 0x40n * BUCKETS);
    high.write(state.rip, hexBytes('cd14'));
    const after = run(state, state.rip + 2n);
    expect(differences({ ...state, rip: state.rip + 2n }, after)).toEqual([]);
  });

  it('loses exactly one pair and handler when one is removed; the others still work', () => {
    const chain = high.start + CHAIN;
    for (const removed of [0, 4, 7, 19]) {
      const { cases, region } = many(chain);
      const before = Buffer.from(region.region.bytes);
      write(high, ...region.relocations[removed]!.removal);
      for (const [n, prepared] of cases.entries()) {
        const after = run(prepared.state, n === removed ? chain : end(prepared));
        if (n !== removed) expect(after.rcx).toBe(BigInt(prepared.entries[1]!));
      }
      const at = Number(region.region.gva - high.start);
      const now = high.memory().subarray(at, at + before.length);
      const changed = [...before.keys()].filter((offset) => before[offset] !== now[offset]);
      const patched = region.relocations[removed]!.removal.flatMap(({ gva, bytes }) =>
        Array.from(bytes.keys(), (offset) => Number(gva - region.region.gva) + offset),
      );
      expect(patched).toEqual(expect.arrayContaining(changed));
      // A pair, and a handler of three entries.
      expect(patched.length).toBe(16 + 3 + 47 + 3 * 11);
    }
  });

  it('says of a thread at every boundary in it that it has to wait, and of one outside nothing', () => {
    const { cases, region } = many();
    const [first, second] = region.relocations;
    const whereIn = { first: 0, second: 0, dispatcher: 0 };
    for (const [n, name] of (['first', 'second'] as const).entries()) {
      const prepared = cases[n]!;
      run(prepared.state, end(prepared), (rip) => {
        const thread = { rip };
        const waits = { mustWait: 'uses-stack' };
        if (rip === end(prepared)) {
          expect(region.evacuation.evacuate(thread)).toBeUndefined();
          return;
        }
        expect(region.evacuation.evacuate(thread)).toEqual(waits);
        const own = region.relocations[n]!.evacuation.evacuate(thread);
        const other = (n === 0 ? second : first)!.evacuation.evacuate(thread);
        expect(own).toEqual(waits);
        if (other === undefined) whereIn[name]++;
        else whereIn.dispatcher++;
      });
    }
    // pop, pop, pop, the header's twelve, mov, iretq
    expect(whereIn).toMatchObject({ first: 17, second: 17 });
    expect(whereIn.dispatcher).toBeGreaterThan(20);
    expect(region.evacuation.evacuate({ rip: cases[0]!.load.gva })).toBeUndefined();
  });
});

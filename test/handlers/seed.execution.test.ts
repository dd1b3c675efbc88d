import fc from 'fast-check';
import { afterAll, describe, it } from 'vitest';
import { SEED_STACK_BYTES, seedLayout } from '../../src/handlers/seed.js';
import {
  anyCase,
  everyChoice,
  everyIndex,
  everyPair,
  expectNoDifference,
  HandlerRuns,
  overwriteBelowStack,
  type Prepared,
  STARTS,
} from './execution.js';

/** What the handler leaves on the stack: the index, zero where a pointer to it was, the flags. */
function stackSlots(before: Buffer, { arena, state, test }: Prepared): Buffer {
  const expected = Buffer.from(before);
  const top = Number(state.rsp - arena.start);
  expected.writeBigUInt64LE(state[test.idx], top - SEED_STACK_BYTES);
  expected.writeBigUInt64LE(0n, top - 16);
  expected.writeBigUInt64LE(state.rflags, top - 8);
  return expected;
}

const runs = new HandlerRuns({
  layOut: ({ load, entries }) => seedLayout(load, entries),
  replaces: 'load',
  memoryAfter: stackSlots,
});
afterAll(() => runs.close());

describe('the seed handler does what the load did: registers, flags, RIP, and memory but for its stack slots', () => {
  it('for every choice of dst, idx and base, equal ones included', () => {
    expectNoDifference(everyChoice(), runs.compare);
  });

  it('for every dst, idx and index of small tables', () => {
    expectNoDifference(everyIndex([1, 2, 16], everyPair), runs.compare);
  });

  it('for every index of the largest table', () => {
    const pairs = [
      ['rcx', 'rax'],
      ['rax', 'rax'],
      ['r12', 'r13'],
      ['r9', 'rdx'],
    ] as const;
    expectNoDifference(everyIndex([256], pairs), runs.compare);
  });

  it('for any registers, flags, stack, displacement and entries', () => {
    fc.assert(
      fc.property(anyCase, (test) => expectNoDifference([test], runs.compare)),
      { numRuns: 1000 },
    );
  });

  it('for a byte table, whose bytes are its entries', () => {
    const entries = Uint32Array.from({ length: 200 }, (_, i) => (i * 7) & 0xff);
    expectNoDifference(
      [{ dst: 'rcx', idx: 'rax', base: 'rdx', entries, index: 77, start: STARTS[0]! }],
      runs.compare,
    );
  });
});

describe('an interrupt at any instruction boundary of the seed handler', () => {
  it('is harmless, with all of the stack below RSP overwritten each time', () => {
    expectNoDifference(everyIndex([3], everyPair), (test) =>
      runs.compareInterrupted(test, overwriteBelowStack),
    );
  });

  it('is harmless, with a real frame pushed and returned from each time', () => {
    expectNoDifference(everyIndex([3], everyPair), (test) => runs.compareWithRealInterrupts(test));
  });
});

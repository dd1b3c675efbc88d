import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { LEAN_PACKINGS, leanLayout } from '../../src/handlers/lean.js';
import {
  anyCase,
  anyTwoLevelCase,
  type Case,
  everyByteIndex,
  everyChoice,
  everyIndex,
  everyKind,
  everyPairOfKinds,
  everyTwoLevelKind,
  expectNoDifference,
  HandlerRuns,
  isInFrame,
  overwriteBelowStack,
  SOME_PAIRS,
} from './execution.js';

describe.each(LEAN_PACKINGS)('the %s lean handler', (packing) => {
  const runs = new HandlerRuns({
    layOut: ({ load, entries }) => leanLayout({ load, entries }, packing),
    replaces: 'load',
  });
  afterAll(() => runs.close());

  it('is refused where a preempted thread could not leave it, or no register can hold an address', () => {
    for (const test of everyKind()) {
      const { dst, idx, base } = test;
      const isLost = (dst === idx || dst === base) && !isInFrame(dst);
      const none = dst === idx && dst === base ? 'no-register-for-address' : undefined;
      expect(runs.refusal(test)).toBe(isLost ? 'register-not-in-frame' : none);
    }
  });

  describe('does what the load did: registers, flags, RIP, and no byte of memory changed,', () => {
    it('for every choice of dst, idx and base', () => {
      const cases = packing === 'roomy' ? everyChoice() : everyKind();
      expectNoDifference([...cases].filter(runs.isPossible), runs.compare);
    });

    it('for every dst and idx, and every index of tables of each kind of size', () => {
      const cases = [...everyIndex([1, 2, 16, 17, 31], everyPairOfKinds)];
      expectNoDifference(cases.filter(runs.isPossible), runs.compare);
    });

    it.skipIf(packing === 'tight' || packing === 'short')('for every index of large tables', () => {
      expectNoDifference([...everyIndex([32, 256], SOME_PAIRS)].filter(runs.isPossible), runs.compare);
    });

    it('for any registers, flags, stack, displacement and entries', () => {
      fc.assert(
        fc.property(anyCase.filter(runs.isPossible), (test) => expectNoDifference([test], runs.compare)),
        { numRuns: 300 },
      );
    });

    it('where many entries are alike, as in a byte table', () => {
      const alike = (index: number) =>
        Uint32Array.from({ length: 60 }, (_, k) => (k % 5) * Number(k > index));
      const cases = [...everyIndex([31], SOME_PAIRS)].map((test) => ({
        ...test,
        entries: alike(test.index),
      }));
      const possible = cases.filter(runs.isPossible);
      if (packing === 'tight') expect(possible).toEqual([]);
      else expectNoDifference(possible, runs.compare);
    });
  });

  describe('at any instruction boundary', () => {
    const few = () => [...everyIndex([3], everyPairOfKinds)].filter(runs.isPossible);

    it('takes no harm when all below RSP is overwritten', () => {
      expectNoDifference(few(), (test) => runs.compareInterrupted(test, overwriteBelowStack));
    });

    it('lets a vCPU and a preempted thread leave, for every kind of registers', () => {
      expectNoDifference([...everyKind()].filter(runs.isPossible), runs.compareEvacuated);
    });

    it('lets a vCPU and a preempted thread leave, for every index', () => {
      const pairs = [
        ['rcx', 'rax'],
        ['rax', 'rax'],
        ['r10', 'r10'],
      ] as const;
      expectNoDifference([...everyIndex([1, 31], pairs)].filter(runs.isPossible), runs.compareEvacuated);
    });

    it('takes no harm of a real interrupt frame pushed and returned from', () => {
      expectNoDifference(few(), (test) => runs.compareWithRealInterrupts(test));
    });
  });
});

describe.each(LEAN_PACKINGS)('the %s lean handler of both loads of a two-level switch', (packing) => {
  const runs = new HandlerRuns({ layOut: ({ whole }) => leanLayout(whole, packing), replaces: 'loads' });
  afterAll(() => runs.close());
  const possible = (cases: Iterable<Case>) => [...cases].filter(runs.isPossible);

  it('is refused where a preempted thread could not leave it, or a block has no room for two registers', () => {
    for (const test of everyTwoLevelKind()) {
      const { dst, idx, base, byte } = test;
      const isLost = [byte!.idx, base].some((name) => [dst, idx].includes(name) && !isInFrame(name));
      const isTooLong = packing === 'tight' && dst !== idx;
      expect(runs.refusal(test)).toBe(
        isLost ? 'register-not-in-frame' : isTooLong ? 'does-not-fit' : undefined,
      );
    }
  });

  it('does what both loads did: registers, flags, RIP, and no byte of memory changed', () => {
    expectNoDifference(possible(everyTwoLevelKind()), runs.compare);
    expectNoDifference(possible(everyByteIndex([1, 2, 31, 100])), runs.compare);
    fc.assert(
      fc.property(anyTwoLevelCase.filter(runs.isPossible), (test) =>
        expectNoDifference([test], runs.compare),
      ),
      { numRuns: 300 },
    );
  });

  it('takes no harm at any instruction boundary', () => {
    const few = possible(everyByteIndex([7]));
    expectNoDifference(few, (test) => runs.compareInterrupted(test, overwriteBelowStack));
    expectNoDifference(few, (test) => runs.compareWithRealInterrupts(test));
  });

  it('lets a vCPU and a preempted thread leave at any instruction boundary', () => {
    expectNoDifference(possible(everyTwoLevelKind()), runs.compareEvacuated);
    expectNoDifference(possible(everyByteIndex([31])), runs.compareEvacuated);
  });
});

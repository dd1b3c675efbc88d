import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { fusedLayout, SWITCH_PACKINGS } from '../../src/handlers/fused.js';
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

describe.each(SWITCH_PACKINGS)('the %s fused handler', (packing) => {
  const runs = new HandlerRuns({ layOut: ({ whole }) => fusedLayout(whole, packing), replaces: 'switch' });
  afterAll(() => runs.close());
  const possible = (cases: Iterable<Case>) => [...cases].filter(runs.isPossible);

  it('is refused where a preempted thread could not leave it, or no register can hold an address', () => {
    for (const test of everyKind()) {
      const { dst, idx, base } = test;
      const isLost = (dst === idx || dst === base) && !isInFrame(dst);
      const none = dst === idx && dst === base ? 'no-register-for-address' : undefined;
      expect(runs.refusal(test)).toBe(isLost ? 'register-not-in-frame' : none);
    }
    for (const test of everyTwoLevelKind()) {
      const { dst, idx, base, byte } = test;
      const isLost = [byte!.idx, base].some((name) => [dst, idx].includes(name) && !isInFrame(name));
      expect(runs.refusal(test)).toBe(isLost ? 'register-not-in-frame' : undefined);
    }
  });

  describe('does what load, add and jmp did: registers, flags, RIP, and no byte of memory changed,', () => {
    it('for every choice of dst, idx and base', () => {
      expectNoDifference(possible(packing === 'roomy' ? everyChoice() : everyKind()), runs.compare);
    });

    it('for every dst and idx, and every index of small tables', () => {
      expectNoDifference(possible(everyIndex([1, 2, 9], everyPairOfKinds)), runs.compare);
    });

    it.skipIf(packing === 'short')('for every index of large tables', () => {
      expectNoDifference(possible(everyIndex([32, 256], SOME_PAIRS.slice(0, 2))), runs.compare);
    });

    it('for any registers, flags, stack, displacement and entries', () => {
      fc.assert(
        fc.property(anyCase.filter(runs.isPossible), (test) => expectNoDifference([test], runs.compare)),
        { numRuns: 300 },
      );
    });
  });

  describe('does what both loads of a two-level switch did, its byte in its register included,', () => {
    it('for every kind of registers', () => {
      expectNoDifference(possible(everyTwoLevelKind()), runs.compare);
    });

    it('for every index', () => {
      expectNoDifference(possible(everyByteIndex([1, 2, 31, 100])), runs.compare);
    });

    it('for any registers, flags, stack, displacement and tables', () => {
      const any = anyTwoLevelCase.filter(runs.isPossible);
      fc.assert(
        fc.property(any, (test) => expectNoDifference([test], runs.compare)),
        { numRuns: 300 },
      );
    });
  });

  describe('at any instruction boundary', () => {
    const few = () => possible([...everyIndex([3], everyPairOfKinds), ...everyByteIndex([7])]);

    it('takes no harm when all below RSP is overwritten', () => {
      expectNoDifference(few(), (test) => runs.compareInterrupted(test, overwriteBelowStack));
    });

    it('lets a vCPU and a preempted thread leave, for every choice of registers', () => {
      expectNoDifference(possible(everyKind()), runs.compareEvacuated);
      expectNoDifference(possible(everyTwoLevelKind()), runs.compareEvacuated);
    });

    it('lets a vCPU and a preempted thread leave, for every index', () => {
      expectNoDifference(possible(everyByteIndex([31])), runs.compareEvacuated);
    });

    it('takes no harm of a real interrupt frame pushed and returned from', () => {
      expectNoDifference(few(), (test) => runs.compareWithRealInterrupts(test));
    });
  });
});

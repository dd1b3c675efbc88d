import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { LEAN_PACKINGS, leanLayout } from '../../src/handlers/lean.js';
import {
  anyCase,
  type Case,
  everyChoice,
  everyIndex,
  everyPair,
  expectNoDifference,
  HandlerRuns,
  hasAddressRegister,
  overwriteBelowStack,
  SOME_PAIRS,
} from './execution.js';

const BLOCK_INSTRUCTIONS = { roomy: 2, dense: 2, tight: 3 };
/** Beyond, no short jump reaches. */
const MOST_ENTRIES = { roomy: 256, dense: 256, tight: 31 };

describe.each(LEAN_PACKINGS)('the %s lean handler', (packing) => {
  const runs = new HandlerRuns({
    layOut: (load, entries) => leanLayout(load, entries, packing),
    blockInstructions: BLOCK_INSTRUCTIONS[packing],
  });
  afterAll(() => runs.close());
  const fits = ({ entries }: Case) => entries.length <= MOST_ENTRIES[packing];

  it('does what the load did on top of RIP, too, where the base is not proven', () => {
    const onRip = new HandlerRuns({
      layOut: ({ baseValue, ...load }, entries) => leanLayout(load, entries, packing),
      blockInstructions: BLOCK_INSTRUCTIONS[packing],
    });
    expectNoDifference(
      [...everyChoice()].filter(({ dst, idx }) => dst !== idx),
      onRip.compare,
    );
    onRip.close();
  });

  describe('does what the load did: registers, flags, RIP, and no byte of memory changed,', () => {
    it('for every choice of dst, idx and base', () => {
      const cases = [...everyChoice()];
      expectNoDifference(cases.filter(hasAddressRegister), runs.compare);
      expect(cases.filter((test) => !hasAddressRegister(test)).length).toBe(15);
    });

    it('for every dst and idx, and every index of tables of each kind of size', () => {
      const sizes = [1, 2, 16, 17, 31].filter((size) => size <= MOST_ENTRIES[packing]);
      expectNoDifference(everyIndex(sizes, everyPair), runs.compare);
    });

    it('for every index of large tables', () => {
      expectNoDifference([...everyIndex([32, 256], SOME_PAIRS)].filter(fits), runs.compare);
    });

    it('for any registers, flags, stack, displacement and entries', () => {
      fc.assert(
        fc.property(
          anyCase.filter((test) => hasAddressRegister(test) && fits(test)),
          (test) => expectNoDifference([test], runs.compare),
        ),
        { numRuns: 500 },
      );
    });
  });

  describe('at any instruction boundary', () => {
    it('takes no harm when all below RSP is overwritten', () => {
      expectNoDifference(everyIndex([3], everyPair), (test) =>
        runs.compareInterrupted(test, overwriteBelowStack),
      );
    });

    it('can be left without it, for every choice of dst, idx and base', () => {
      expectNoDifference([...everyChoice()].filter(hasAddressRegister), runs.compareEvacuated);
    });

    it('can be left without it, for every index', () => {
      const pairs = [
        ['rcx', 'rax'],
        ['rax', 'rax'],
        ['r13', 'r13'],
      ] as const;
      expectNoDifference(everyIndex([1, 31], pairs), runs.compareEvacuated);
    });

    it('takes no harm of a real interrupt frame pushed and returned from', () => {
      expectNoDifference(everyIndex([3], everyPair), (test) => runs.compareWithRealInterrupts(test));
    });
  });
});

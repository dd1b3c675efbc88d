import fc from 'fast-check';
import { afterAll, describe, it } from 'vitest';
import { fusedLayout } from '../../src/handlers/fused.js';
import {
  anyCase,
  everyChoice,
  everyIndex,
  everyPair,
  expectNoDifference,
  HandlerRuns,
  hasAddressRegister,
  overwriteBelowStack,
  SOME_PAIRS,
} from './execution.js';

const runs = new HandlerRuns({
  layOut: (load, entries, dispatch) => fusedLayout(load, dispatch, entries),
  blockInstructions: 3,
  toCase: true,
});
afterAll(() => runs.close());

describe('the fused handler does what load, add and jmp did: registers, flags, RIP, and no byte of memory changed,', () => {
  it('for every choice of dst, idx and base', () => {
    expectNoDifference([...everyChoice()].filter(hasAddressRegister), runs.compare);
  });

  it('for every dst and idx, and every index of small tables', () => {
    expectNoDifference(everyIndex([1, 2, 16, 31], everyPair), runs.compare);
  });

  it('for every index of large tables', () => {
    expectNoDifference(everyIndex([32, 256], SOME_PAIRS), runs.compare);
  });

  it('for any registers, flags, stack, displacement and entries', () => {
    fc.assert(
      fc.property(anyCase.filter(hasAddressRegister), (test) => expectNoDifference([test], runs.compare)),
      { numRuns: 1000 },
    );
  });
});

describe('at any instruction boundary of the fused handler', () => {
  it('no harm is done when all below RSP is overwritten', () => {
    expectNoDifference(everyIndex([3], everyPair), (test) =>
      runs.compareInterrupted(test, overwriteBelowStack),
    );
  });

  it('it can be left without it, for every choice of dst, idx and base', () => {
    expectNoDifference([...everyChoice()].filter(hasAddressRegister), runs.compareEvacuated);
  });

  it('no harm is done by a real interrupt frame pushed and returned from', () => {
    expectNoDifference(everyIndex([3], everyPair), (test) => runs.compareWithRealInterrupts(test));
  });
});

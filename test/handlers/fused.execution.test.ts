import fc from 'fast-check';
import { afterAll, describe, it } from 'vitest';
import { fusedLayout } from '../../src/handlers/fused.js';
import {
  anyCase,
  type Case,
  everyChoice,
  everyIndex,
  everyPair,
  expectNoDifference,
  HandlerRuns,
  overwriteBelowStack,
} from './execution.js';

/** The only choice that leaves no register for an address. */
const isPossible = ({ dst, idx, base }: Case) => dst !== idx || dst !== base;

const runs = new HandlerRuns({
  layOut: (load, entries, dispatch) => fusedLayout(load, dispatch, entries),
  blockInstructions: 3,
  toCase: true,
});
afterAll(() => runs.close());

describe('the fused handler does what load, add and jmp did: registers, flags, RIP, and no byte of memory changed,', () => {
  it('for every choice of dst, idx and base', () => {
    expectNoDifference([...everyChoice()].filter(isPossible), runs.compare);
  });

  it('for every dst and idx, and every index of small tables', () => {
    expectNoDifference(everyIndex([1, 2, 16, 31], everyPair), runs.compare);
  });

  it('for every index of large tables', () => {
    const pairs = [
      ['rcx', 'rax'],
      ['rax', 'rax'],
      ['rbp', 'rbp'],
      ['r12', 'r13'],
      ['r13', 'r13'],
      ['r9', 'rdx'],
    ] as const;
    expectNoDifference(everyIndex([32, 256], pairs), runs.compare);
  });

  it('for any registers, flags, stack, displacement and entries', () => {
    fc.assert(
      fc.property(anyCase.filter(isPossible), (test) => expectNoDifference([test], runs.compare)),
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
    expectNoDifference([...everyChoice()].filter(isPossible), runs.compareEvacuated);
  });

  it('no harm is done by a real interrupt frame pushed and returned from', () => {
    expectNoDifference(everyIndex([3], everyPair), (test) => runs.compareWithRealInterrupts(test));
  });
});

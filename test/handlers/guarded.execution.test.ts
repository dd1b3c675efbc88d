import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { SWITCH_PACKINGS } from '../../src/handlers/fused.js';
import { guardedLayout } from '../../src/handlers/guarded.js';
import {
  anyCase,
  anyTwoLevelCase,
  type Case,
  everyByteIndex,
  everyIndex,
  everyKind,
  everyPairOfKinds,
  everyTwoLevelKind,
  expectNoDifference,
  type GuestCode,
  HandlerRuns,
  overwriteBelowStack,
} from './execution.js';

describe.each(SWITCH_PACKINGS)('the %s guarded handler', (packing) => {
  /** @param known of the entries, how many the handler is told of */
  const guarded = (known: number) => {
    const layOut = ({ whole, table }: GuestCode) => {
      const { byteLoad, entries } = whole;
      const short =
        byteLoad === undefined
          ? { ...whole, entries: Array.from(entries).slice(0, known) }
          : { ...whole, byteLoad: { ...byteLoad, entries: Array.from(byteLoad.entries).slice(0, known) } };
      return guardedLayout(short, table, packing);
    };
    return new HandlerRuns({ layOut, replaces: 'switch' });
  };

  describe.each([
    ['within the bound', Number.POSITIVE_INFINITY],
    ['beyond the bound, where the load itself is executed', 2],
  ])('does what the switch did %s,', (_, known) => {
    const runs = guarded(known);
    afterAll(() => runs.close());
    const possible = (cases: Iterable<Case>) => [...cases].filter(runs.isPossible);

    it('for every kind of registers', () => {
      expectNoDifference(possible([...everyKind(), ...everyTwoLevelKind()]), runs.compare);
    });

    it('for every index, on both sides of what fits a byte', () => {
      const cases = [...everyIndex([1, 9], everyPairOfKinds), ...everyByteIndex([31])];
      const large = everyIndex([140], [['rcx', 'rax']]);
      expectNoDifference(possible([...cases, ...large]), runs.compare);
    });

    it('for any registers, flags, stack, displacement and tables', () => {
      const any = fc.oneof(anyCase, anyTwoLevelCase).filter(runs.isPossible);
      fc.assert(
        fc.property(any, (test) => expectNoDifference([test], runs.compare)),
        { numRuns: 150 },
      );
    });

    it('where a vCPU or a preempted thread leaves it before any of its instructions', () => {
      const cases = possible([...everyKind(), ...everyTwoLevelKind(), ...everyByteIndex([13])]);
      // The fused handler's tests try all; here a third in turn.
      expectNoDifference(
        cases.filter((_test, n) => n % 3 === 0),
        runs.compareEvacuated,
      );
    });

    it('where it is interrupted before any of its instructions', () => {
      const few = possible([...everyIndex([3], everyPairOfKinds), ...everyByteIndex([7])]);
      expectNoDifference(few, (test) => runs.compareInterrupted(test, overwriteBelowStack));
      expectNoDifference(few, (test) => runs.compareWithRealInterrupts(test));
    });
  });

  it('compares all 64 bits: an index whose low half is within the bound reaches the copy of the load', () => {
    const runs = guarded(Number.POSITIVE_INFINITY);
    const pairs = everyPairOfKinds.filter(([dst, idx]) => dst !== idx);
    for (const test of [...everyIndex([2], pairs)].filter(runs.isPossible)) {
      for (const beyond of [2n ** 32n, 2n ** 63n, 2n]) {
        const { arena, plan, state } = runs.prepare(test);
        arena.write(plan.site.gva, plan.site.bytes);
        arena.enter({ ...state, [test.idx]: beyond + state[test.idx] });
        arena.step(3);
        expect(arena.state().rip).toBe(plan.fallback);
      }
    }
    runs.close();
  });
});

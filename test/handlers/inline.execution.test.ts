import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { SWITCH_PACKINGS } from '../../src/handlers/fused.js';
import { inlineLayout } from '../../src/handlers/inline.js';
import type { Liveness } from '../../src/switches/liveness.js';
import type { GprName } from '../../src/x86/registers.js';
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
  HandlerRuns,
  overwriteBelowStack,
} from './execution.js';

/** What the code at every case needs. */
const LIVE: Readonly<Record<string, Liveness | undefined>> = {
  everything: undefined,
  'no register and no flag': { registers: new Set(), flags: false },
  'the flags': { registers: new Set(), flags: true },
  'rax, rbx and r8': { registers: new Set<GprName>(['rax', 'rbx', 'r8']), flags: false },
};

/** Every other index has a case whose code needs all. */
function mixed(live: Liveness | undefined, { whole }: { whole: Parameters<typeof inlineLayout>[0] }) {
  const odd = new Set(Array.from(whole.entries).filter((_, k) => k % 2 === 1));
  return { ...whole, liveAt: (entry: number) => (odd.has(entry) ? undefined : live) };
}

describe.each(SWITCH_PACKINGS)('the %s inline handler', (packing) => {
  it('fits every one-level site whose destination is not its base, but for roomy blocks', () => {
    const runs = new HandlerRuns({ layOut: ({ whole }) => inlineLayout(whole, packing), replaces: 'switch' });
    const needsTwoSteps = packing === 'roomy' || packing === 'shared';
    for (const test of everyKind()) {
      if (test.dst === test.base || needsTwoSteps) continue;
      expect([undefined, 'register-not-in-frame']).toContain(runs.refusal(test));
    }
    runs.close();
  });

  describe.each(Object.keys(LIVE))('does what the switch did where its cases need %s', (needed) => {
    const runs = new HandlerRuns({
      layOut: ({ whole }) => inlineLayout(whole, packing),
      replaces: 'switch',
      live: LIVE[needed],
    });
    afterAll(() => runs.close());
    const possible = (cases: Iterable<Case>) => [...cases].filter(runs.isPossible);

    it('for every kind of registers', () => {
      expectNoDifference(possible([...everyKind(), ...everyTwoLevelKind()]), runs.compare);
    });

    it('for every index', () => {
      const cases = [...everyIndex([1, 9], everyPairOfKinds), ...everyByteIndex([1, 31, 100])];
      expectNoDifference(possible(cases), runs.compare);
    });

    it('for any registers, flags, stack, displacement and tables', () => {
      const any = fc.oneof(anyCase, anyTwoLevelCase).filter(runs.isPossible);
      fc.assert(
        fc.property(any, (test) => expectNoDifference([test], runs.compare)),
        { numRuns: 150 },
      );
    });

    it('where a vCPU or a preempted thread leaves it before any of its instructions', () => {
      const cases = [...everyKind(), ...everyTwoLevelKind(), ...everyByteIndex([13])];
      // The other encoders' tests try all; here a third in turn.
      expectNoDifference(
        possible(cases).filter((_, n) => n % 3 === 0),
        runs.compareEvacuated,
      );
    });

    it('where it is interrupted before any of its instructions', () => {
      const few = possible([...everyIndex([3], everyPairOfKinds), ...everyByteIndex([7])]);
      expectNoDifference(few, (test) => runs.compareInterrupted(test, overwriteBelowStack));
      expectNoDifference(few, (test) => runs.compareWithRealInterrupts(test));
    });
  });

  it('sets all that a case needs where another needs nothing', () => {
    const dead = LIVE['no register and no flag'];
    const runs = new HandlerRuns({
      layOut: (code) => inlineLayout(mixed(dead, code), packing),
      replaces: 'switch',
    });
    const leadsToOdd = ({ byte, index }: Case) => (byte?.values[index] ?? index) % 2 === 1;
    const cases = [...everyIndex([9], everyPairOfKinds), ...everyByteIndex([31])].filter(leadsToOdd);
    expectNoDifference(cases.filter(runs.isPossible), runs.compare);
    runs.close();
  });
});

import { describe, expect, test } from 'vitest';
import { phaseBetween } from '../../src/demo/phase.js';
import {
  type Decided,
  type GuestVerdict,
  guestShortcomings,
  judgeSites,
  lateViolations,
  lexerShortcomings,
  type Relocated,
  type RelocatedPhase,
  speedShortcomings,
} from '../../src/demo/verdict.js';
import type { SwitchSite } from '../../src/guest/artefacts.js';
import { type Counts, hostStatistics } from './statistics.js';

const GOOD_GUEST: GuestVerdict = {
  checksumOk: true,
  integritySweeps: 9,
  integrityMismatches: 0,
  identicalAfterUnload: true,
};

/** One second with so many switches of each form, and a whole sweep. */
function second(switches: number, sweeps = 2, twoLevel = switches) {
  const end = hostStatistics({
    uptimeMs: 1000,
    switches: { 'one-level': switches, 'two-level': twoLevel },
    sweeps,
  });
  return phaseBetween(hostStatistics({}), end);
}

const GOOD_PHASES = { unhooked: second(5000), hooked: second(100), relocated: second(2000) };

describe('the guest', () => {
  test('that noticed nothing has no shortcoming', () => {
    expect(guestShortcomings(GOOD_PHASES, GOOD_GUEST)).toEqual([]);
  });

  test.each<[Partial<GuestVerdict>, string]>([
    [{ checksumOk: false }, "the guest's checksums are not what its workload computes"],
    [{ integrityMismatches: 3 }, "the guest's integrity checker saw 3 changed bytes"],
    [{ identicalAfterUnload: false }, 'the kernel image differs after unload'],
  ])('%o', (change, says) => {
    expect(guestShortcomings(GOOD_PHASES, { ...GOOD_GUEST, ...change })).toEqual([says]);
  });

  test.each(['unhooked', 'hooked', 'relocated'] as const)('was not swept in the %s phase', (name) => {
    const phases = { ...GOOD_PHASES, [name]: second(2000, 1) };
    expect(guestShortcomings(phases, GOOD_GUEST)).toEqual([`no full integrity sweep in the ${name} phase`]);
  });
});

describe('the lexer', () => {
  const lexer = { pieces: 50, passes: 2, tokens: 500, checksum: 1, mismatches: 0 };
  const read = { ...GOOD_PHASES.unhooked, lexerPieces: 1 };
  const phases = { unhooked: read, hooked: read, relocated: read };

  test('that found the same in every phase has no shortcoming', () => {
    expect(lexerShortcomings(phases, { ...GOOD_GUEST, lexer })).toEqual([]);
  });

  test('found other tokens', () => {
    const guest = { ...GOOD_GUEST, lexer: { ...lexer, mismatches: 2 } };
    expect(lexerShortcomings(phases, guest)).toEqual([
      "the guest's lexer found other tokens than at first in 2 pieces of its text",
    ]);
  });

  test.each(['unhooked', 'hooked', 'relocated'] as const)('read nothing in the %s phase', (name) => {
    const idle = { ...phases, [name]: GOOD_PHASES.unhooked };
    expect(lexerShortcomings(idle, { ...GOOD_GUEST, lexer })).toEqual([
      `the guest's lexer read no piece of its text in the ${name} phase`,
    ]);
  });
});

describe('the speed', () => {
  test('of exactly 20 times is enough, a little less is not', () => {
    expect(speedShortcomings(GOOD_PHASES, 1)).toEqual([]);
    expect(speedShortcomings({ ...GOOD_PHASES, relocated: second(1999) }, 1)).toEqual([
      'one-level switches became 20.0 times as fast, not 20 times',
      'two-level switches became 20.0 times as fast, not 20 times',
    ]);
    expect(speedShortcomings({ ...GOOD_PHASES, relocated: second(2000, 2, 1500) }, 1)).toEqual([
      'two-level switches became 15.0 times as fast, not 20 times',
    ]);
  });

  test('of a guest that stood still in both phases is no speed', () => {
    const phases = { ...GOOD_PHASES, hooked: second(0), relocated: second(0) };
    expect(speedShortcomings(phases, 1)).toHaveLength(2);
  });

  test('without a relocation is none of ours', () => {
    expect(speedShortcomings(GOOD_PHASES, 0)).toEqual(['no load was relocated']);
  });
});

describe('the switches that the guest lists', () => {
  const BASE = 0xfffff80000000000n;
  const site = { name: 'one', loadRva: 0x1000, expected: 'relocatable' } as SwitchSite;
  const sites: SwitchSite[] = [
    site,
    { ...site, name: 'two', loadRva: 0x2000, byteLoadRva: 0x1ff0 },
    { ...site, name: 'fake', loadRva: 0x3000, expected: 'not-a-switch' },
    { ...site, name: 'cold', loadRva: 0x4000 },
  ];
  const relocated = (rva: bigint) => ({ type: 'relocated', site: BASE + rva }) as Decided;
  const refused = (rva: bigint, reason = 'no-slack') =>
    ({ type: 'refused', site: BASE + rva, reason }) as Decided;
  const judge = (...decided: Decided[]) => judgeSites(sites, BASE, decided);

  test('are relocated, and what only looks like one is left alone', () => {
    const decided = [relocated(0x1000n), relocated(0x2000n), refused(0x3000n), refused(0x9000n)];
    expect(judge(...decided)).toEqual({
      counts: { listed: 3, relocated: 2, undecided: 1 },
      shortcomings: [],
    });
  });

  test('are not left alone, by neither of their loads', () => {
    expect(judge(refused(0x1000n), refused(0x1ff0n, 'in-use')).shortcomings).toEqual([
      'one was left alone: no-slack',
      'two was left alone: in-use',
    ]);
  });

  test('are the only ones that are relocated', () => {
    expect(judge(relocated(0x3000n), relocated(0x9000n)).shortcomings).toEqual([
      "fake was relocated, and is none of the guest's switches",
      "0xfffff80000009000 was relocated, and is none of the guest's switches",
    ]);
  });

  test('are those of the kernel: what becomes of a module is not in the list', () => {
    const decided = { ...refused(0x1000n), module: 'other.sys' } as Decided;
    expect(judge(decided).shortcomings).toEqual([]);
  });
});

describe('violations after a relocation', () => {
  const SITE = 0xfffff80000001000n;

  function relocated(hits: number, site = SITE): Relocated {
    return {
      type: 'relocated',
      site,
      table: 0n,
      form: 'one-level',
      entries: 4,
      loads: [{ site, hits, stillReached: false }],
      handler: 0n,
      handlers: [{ site, gva: 0n, bytes: 91 }],
      encoder: 'seed',
      handlerBytes: 91,
      passedOver: {},
      hits,
    };
  }

  function look(violations: number, stale: number): RelocatedPhase['from'] {
    const sites: Counts['sites'] = violations === 0 ? [] : [{ violations, stale }];
    return hostStatistics({ sites }).violations;
  }

  const late = (looks: Partial<RelocatedPhase>) =>
    lateViolations({ before: [], during: [], from: look(0, 0), to: look(0, 0), end: look(0, 0), ...looks });

  describe('of a load relocated before the phase', () => {
    const before = [relocated(100)];

    test('none', () => {
      expect(late({ before, from: look(100, 0), to: look(100, 0), end: look(100, 0) })).toEqual([]);
    });

    test('one is one too many, whatever the engine has counted', () => {
      const says = ['NtSomething was still trapped 1 times after it had been relocated'];
      expect(late({ before, from: look(100, 0), to: look(101, 0), end: look(101, 0) })).toEqual(says);
      const lavish = [relocated(1_000_000)];
      expect(late({ before: lavish, from: look(100, 0), to: look(101, 0), end: look(101, 0) })).toEqual(says);
    });

    test('a stale one is none, also when it is answered after the phase', () => {
      expect(late({ before, from: look(100, 0), to: look(101, 1), end: look(101, 1) })).toEqual([]);
      expect(late({ before, from: look(100, 0), to: look(101, 0), end: look(101, 1) })).toEqual([]);
    });

    test('a stale one from before the phase excuses no other', () => {
      expect(late({ before, from: look(101, 1), to: look(102, 1), end: look(102, 1) })).toHaveLength(1);
    });

    test('the ones after the unload has restored the load do not count', () => {
      expect(late({ before, from: look(100, 0), to: look(100, 0), end: look(140, 0) })).toEqual([]);
    });
  });

  describe('of a load relocated in the phase', () => {
    const during = [relocated(51)];

    test('none: what had trapped by then are the hits', () => {
      expect(late({ during, from: look(10, 0), to: look(51, 0), end: look(51, 0) })).toEqual([]);
    });

    test('one is one too many', () => {
      expect(late({ during, from: look(10, 0), to: look(52, 0), end: look(52, 0) })).toHaveLength(1);
    });

    test('a stale one is none', () => {
      expect(late({ during, from: look(10, 0), to: look(52, 0), end: look(52, 1) })).toEqual([]);
    });

    test('that was relocated when the phase had ended had trapped less by then', () => {
      expect(late({ during, from: look(10, 0), to: look(40, 0), end: look(51, 0) })).toEqual([]);
    });
  });

  test('of a load that follows another there may be one for each thread that was between them, and no more', () => {
    const first = relocated(100);
    const before = [{ ...first, loads: [{ site: SITE, hits: 100, stillReached: true }] }];
    const from = look(100, 0);
    expect(late({ before, from, to: look(103, 0), end: look(103, 0) })).toEqual([]);
    expect(late({ before, from, to: look(300, 0), end: look(300, 0) })).toHaveLength(1);
  });

  test('a load that is none of the workload’s is not looked for', () => {
    expect(late({ before: [relocated(60, 0xfffff80000009999n)], to: look(5, 0), end: look(5, 0) })).toEqual(
      [],
    );
  });
});

import { expect, test } from 'vitest';
import { Redirections } from '../../src/memtables/redirections.js';
import { SlackAllocator } from '../../src/slack/allocator.js';
import { GVA, twoPageGuest } from './two-page-guest.js';

const SLACK = { section: '.text', gva: GVA + 0x1800n, size: 0x100 };
const PLAN = {
  kind: 'hook',
  label: 'x',
  isDivided: false,
  code: { gva: SLACK.gva, bytes: Buffer.alloc(24, 0xcc) },
  jump: { gva: GVA + 0x10n, bytes: Buffer.from('e911223344', 'hex') },
} as const;

function setUp() {
  const guest = twoPageGuest();
  guest.memory.fill(0, 0x1800, 0x1900);
  const slack = new SlackAllocator([SLACK], (_, length) => new Uint8Array(length));
  const redirections = new Redirections(guest.patcher, slack);
  return { ...guest, slack, redirections, before: Buffer.from(guest.memory) };
}

/** Two loads of one switch. */
function pair(slack: SlackAllocator) {
  return [0n, 0x40n].map((offset) => ({
    ...PLAN,
    code: { gva: PLAN.code.gva + offset, bytes: PLAN.code.bytes },
    jump: { gva: PLAN.jump.gva + offset, bytes: PLAN.jump.bytes },
    slack: slack.allocate(0x40),
  }));
}

/** How many calls of the hypervisor a good run makes. */
function callsOfGoodRun(run: (parts: ReturnType<typeof setUp>) => void): number {
  const parts = setUp();
  run(parts);
  return parts.failing.log.length;
}

const installOne = ({ redirections, slack }: ReturnType<typeof setUp>) =>
  redirections.install({ ...PLAN, slack: slack.allocate(24) });
const installPair = ({ redirections, slack }: ReturnType<typeof setUp>) =>
  redirections.installAll(pair(slack));

test.each([
  ['neither code nor jump is', installOne],
  ['nothing of either of two is', installPair],
])('whichever call fails, %s in the guest, and the slack is free again', (_, install) => {
  const calls = callsOfGoodRun(install);
  expect(calls).toBeGreaterThan(8);
  for (let n = 1; n <= calls; n++) {
    const parts = setUp();
    const { memory, before, trapped, journal, failing, slack, redirections } = parts;
    failing.failAt(n);
    expect(() => install(parts)).toThrow(expect.objectContaining({ code: 'HYPERVISOR_FAILED' }));
    expect(memory).toEqual(before);
    expect([...trapped]).toEqual([]);
    expect(journal.outstanding).toBe(0);
    expect(redirections.all()).toEqual([]);
    expect(slack.freeBytes).toBe(SLACK.size);
  }
});

test('where taking it back fails too, it says so, stays in the list, and is taken out by the next attempt', () => {
  const calls = callsOfGoodRun(installPair);
  let twice = 0;
  for (let n = 1; n <= calls; n++) {
    for (let later = 1; later <= 6; later++) {
      const parts = setUp();
      const { memory, before, trapped, journal, failing, slack, redirections } = parts;
      failing.failAt(n, later);
      let error: unknown;
      try {
        installPair(parts);
      } catch (thrown) {
        error = thrown;
      }
      if (!failing.failed) continue; // there was less to take back
      twice++;
      expect(error).toMatchObject({ code: 'ROLLBACK_FAILED', cause: { code: 'HYPERVISOR_FAILED' } });
      expect(redirections.all()).toHaveLength(1);
      for (const redirection of redirections.all()) redirections.remove(redirection);
      expect(memory).toEqual(before);
      expect([...trapped]).toEqual([]);
      expect(journal.outstanding).toBe(0);
      expect(slack.freeBytes).toBe(SLACK.size);
    }
  }
  expect(twice).toBeGreaterThan(10);
});

test('where putting the replaced code back fails only after its last byte, it counts as put back', () => {
  const parts = setUp();
  const { memory, before, trapped, failing, slack, redirections } = parts;
  const redirection = redirections.install({ ...PLAN, isDivided: true, slack: slack.allocate(24) });
  expect(redirections.isPutBack(redirection)).toBe(false);
  expect(redirections.entryRanges([redirection])).toHaveLength(1);
  // Behind the write of the jump's bytes: nothing else is on their page, so that its trap is released.
  failing.failAtChange(2);
  expect(() => redirections.disable(redirection)).toThrow(/releaseAccess/);
  expect(memory.subarray(0x2000, 0x3000)).toEqual(before.subarray(0x2000, 0x3000));
  expect(redirections.isPutBack(redirection)).toBe(true);
  expect(redirections.entryRanges([redirection])).toEqual([]);
  redirections.remove(redirection);
  expect([...trapped]).toEqual([]);
});

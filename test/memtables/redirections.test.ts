import { expect, test } from 'vitest';
import { Redirections } from '../../src/memtables/redirections.js';
import { SlackAllocator } from '../../src/slack/allocator.js';
import { GVA, twoPageGuest } from './two-page-guest.js';

const SLACK = { section: '.text', gva: GVA + 0x1800n, size: 0x100 };
const PATCHES = {
  code: { gva: SLACK.gva, bytes: Buffer.alloc(24, 0xcc) },
  jump: { gva: GVA + 0x10n, bytes: Buffer.from('e911223344', 'hex') },
};

function setUp() {
  const guest = twoPageGuest();
  guest.memory.fill(0, 0x1800, 0x1900);
  const slack = new SlackAllocator([SLACK], (_, length) => new Uint8Array(length));
  const redirections = new Redirections(guest.patcher, slack);
  return { ...guest, slack, redirections, before: Buffer.from(guest.memory) };
}

/** How many calls of the hypervisor a good run makes. */
function callsOfGoodRun(): number {
  const { failing, slack, redirections } = setUp();
  redirections.install('hook', 'x', PATCHES, slack.allocate(24));
  return failing.log.length;
}

test('whichever call fails, neither code nor jump is in the guest, and the slack is free again', () => {
  const calls = callsOfGoodRun();
  expect(calls).toBeGreaterThan(8);
  for (let n = 1; n <= calls; n++) {
    const { memory, before, trapped, journal, failing, slack, redirections } = setUp();
    failing.failAt(n);
    expect(() => redirections.install('hook', 'x', PATCHES, slack.allocate(24))).toThrow(
      expect.objectContaining({ code: 'HYPERVISOR_FAILED' }),
    );
    expect(memory).toEqual(before);
    expect([...trapped]).toEqual([]);
    expect(journal.outstanding).toBe(0);
    expect(redirections.all()).toEqual([]);
    expect(slack.freeBytes).toBe(SLACK.size);
  }
});

test('where taking it back fails too, it says so, stays in the list, and is taken out by the next attempt', () => {
  const calls = callsOfGoodRun();
  let twice = 0;
  for (let n = 1; n <= calls; n++) {
    for (let later = 1; later <= 6; later++) {
      const { memory, before, trapped, journal, failing, slack, redirections } = setUp();
      failing.failAt(n, later);
      let error: unknown;
      try {
        redirections.install('hook', 'x', PATCHES, slack.allocate(24));
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

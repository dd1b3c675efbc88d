import { describe, expect, test } from 'vitest';
import { describeEvents, inMilliseconds, plural } from '../../src/cli/describe.js';

describe('results in words', () => {
  test('one of something is not many', () => {
    expect([0, 1, 2, 1234].map((count) => plural(count, 'hook'))).toEqual([
      '0 hooks',
      '1 hook',
      '2 hooks',
      '1,234 hooks',
    ]);
    expect([1, 2].map((count) => plural(count, 'entry', 'entries'))).toEqual(['1 entry', '2 entries']);
  });

  test('an unload that is blocked again and again is told once', () => {
    const describeEvent = describeEvents();
    const blocked = { type: 'unload-blocked', where: ['0x1 (x) in the stack of thread 0x2'] } as const;
    expect([blocked, blocked, blocked].map(describeEvent)).toEqual([
      'waiting for threads to leave the handlers',
      undefined,
      undefined,
    ]);
  });

  test('a load that is left alone is told with the reason in words, where it is known', () => {
    const site = { type: 'refused', site: 1n, table: 2n } as const;
    const describeEvent = describeEvents();
    expect(describeEvent({ ...site, reason: 'bound-not-proven' })).toMatch(
      /: it is not known where the table ends \[bound-not-proven\]$/,
    );
    expect(describeEvent({ ...site, reason: 'something-new' })).toMatch(/ alone: something-new$/);
  });

  test('a load of a module is told with the module, and a module that is gone with what was in it', () => {
    const describeEvent = describeEvents();
    expect(
      describeEvent({ type: 'refused', site: 1n, table: 2n, reason: 'no-slack', module: 'a.sys' }),
    ).toMatch(/^left the load at 0x1 in a\.sys alone: /);
    expect(describeEvent({ type: 'module-unloaded', owner: 'a!B', at: 0x10n })).toBe(
      'the guest unloaded the module with a!B at 0x10: forgotten',
    );
  });

  test('seconds have no digits that mean nothing', () => {
    const report = {
      scans: 1,
      blocked: 0,
      inHandlerAtScan: 0,
      evacuated: { vcpus: 0, threads: 0 },
      seconds: 0.012345678,
    };
    expect(inMilliseconds(report)).toEqual({ ...report, seconds: 0.012 });
  });
});

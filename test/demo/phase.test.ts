import { describe, expect, test } from 'vitest';
import { phaseBetween, rate } from '../../src/demo/phase.js';
import { hostStatistics } from './statistics.js';

describe('a phase', () => {
  const before = hostStatistics({
    uptimeMs: 1500,
    switches: { 'one-level': 100, 'two-level': 20, 'look-alike': 3, lexer: 10 },
    sweeps: 7,
    sites: [{ rip: '0x1', violations: 5, stale: 1 }],
  });
  const after = hostStatistics({
    uptimeMs: 4000,
    switches: { 'one-level': 1100, 'two-level': 70, 'look-alike': 4, lexer: 17 },
    sweeps: 10,
    sites: [
      { rip: '0x1', violations: 8, stale: 3 },
      { rip: '0x2', violations: 10 },
      { rip: '0x3', form: 'two-level', violations: 2 },
      { rip: '0x4', form: 'two-level', load: 'byte', violations: 4 },
      { rip: '0x5', form: 'look-alike', violations: 6 },
      { rip: '0x6', form: 'lexer', violations: 1 },
    ],
  });
  const phase = phaseBetween(before, after);

  test('counts what was added, by form; a site that was new counts from zero', () => {
    expect(phase.byForm).toEqual({
      'one-level': { switches: 1000, readViolations: 13 },
      'two-level': { switches: 50, readViolations: 6 },
      'look-alike': { switches: 1, readViolations: 6 },
      lexer: { switches: 7, readViolations: 1 },
    });
  });

  test('its totals are the sums of the forms: nothing twice', () => {
    expect([phase.switches, phase.readViolations]).toEqual([1058, 26]);
  });

  test('lasts as long as the host says, and rates are by that', () => {
    expect(phase.seconds).toBe(2.5);
    expect(rate(phase, 'one-level')).toBe(400);
  });

  test('counts no sweep that had begun before it', () => {
    expect(phase.integritySweeps).toBe(2);
    expect(phaseBetween(before, hostStatistics({ sweeps: 8 })).integritySweeps).toBe(0);
    expect(phaseBetween(before, hostStatistics({ sweeps: 7 })).integritySweeps).toBe(0);
  });

  test('counts no piece of text that had been begun before it, and none where there is no lexer', () => {
    const lexed = (pieces: number) => {
      const statistics = hostStatistics({});
      const lexer = { pieces, passes: 1, tokens: 0, checksum: 0, mismatches: 0 };
      return { ...statistics, guest: { ...statistics.guest!, lexer } };
    };
    expect(phaseBetween(lexed(4), lexed(7)).lexerPieces).toBe(2);
    expect(phaseBetween(lexed(4), lexed(5)).lexerPieces).toBe(0);
    expect(phaseBetween(before, after).lexerPieces).toBe(0);
  });

  test('of a guest that had not booted counts from zero', () => {
    const { guest: _, ...dark } = before;
    expect(phaseBetween(dark, after).byForm['one-level'].switches).toBe(1100);
  });
});

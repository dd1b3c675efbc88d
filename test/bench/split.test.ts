import { describe, expect, test } from 'vitest';
import { disturbance, measuredBetween, type Round, summarize } from '../../src/bench/split.js';
import type { HostStatistics } from '../../src/host/statistics-client.js';
import { hostStatistics } from '../demo/statistics.js';

function host(pageFaults: HostStatistics['pageFaults'], tableLoads: number): HostStatistics {
  return { ...hostStatistics({ sites: [{ violations: tableLoads }] }), pageFaults };
}

function round(bare: number, engine: number, handler: number): Round {
  const measured = (turnaround: number, at = 20) => ({
    ...{ reads: 1, tableLoads: 1, turnaround, host: at },
    perSecond: 1e6 / (turnaround + at),
  });
  return { bare: measured(bare), binding: measured(0), engine: { ...measured(engine, 30), handler } };
}

describe('what the host counted', () => {
  test('only what was counted in between is measured, each part by its own number of events', () => {
    const from = host({ answered: 100, turnaroundNs: 9e9, followed: 10, hostNs: 8e9 }, 40);
    const to = host({ answered: 300, turnaroundNs: 9e9 + 2e6, followed: 110, hostNs: 8e9 + 4e6 }, 90);
    expect(measuredBetween(from, to)).toEqual({
      ...{ reads: 200, perSecond: 20_000, tableLoads: 0.25 },
      ...{ turnaround: 10, host: 40 },
    });
  });

  test('a guest that trapped nothing gives no figures', () => {
    const still = host({ answered: 5, turnaroundNs: 1, followed: 5, hostNs: 1 }, 5);
    expect(() => measuredBetween(still, still)).toThrow(expect.objectContaining({ code: 'BENCH_FAILED' }));
  });
});

describe('the summary', () => {
  test('the parts of a read add up to the time of one with the engine', () => {
    const { perSecond, ratio, microseconds } = summarize([round(10, 18, 3)]);
    expect(microseconds).toEqual({ host: 30, library: 10, ffi: 5, engine: 3 });
    expect(1e6 / perSecond.engine).toBeCloseTo(48);
    expect(ratio).toBeCloseTo(30 / 48);
  });

  test('one round that was disturbed does not move it', () => {
    const calm = round(10, 18, 3);
    expect(summarize([calm, round(900, 90, 50), calm])).toEqual(summarize([calm]));
    expect(summarize([round(10, 18, 3), round(12, 20, 3)]).microseconds.library).toBe(11);
  });

  test('a part that comes out negative is not made to look better', () => {
    expect(summarize([round(20, 18, 3)]).microseconds.ffi).toBe(-5);
  });

  test('a machine that was busy most of the time is noticed, one busy round is not', () => {
    const [calm, busy] = [round(10, 18, 3), round(50, 90, 9)];
    expect(disturbance([calm, busy, calm])).toBe(1);
    expect(disturbance([busy, calm, busy])).toBe(5);
  });
});

import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, onTestFinished, test } from 'vitest';
import { LIBRARIES } from '../libvmi/libraries.js';

const BENCH = fileURLToPath(new URL('../../dist/bench/main.js', import.meta.url));

if (!existsSync(BENCH)) throw new Error('the benchmark is not built: run `npm run setup`');

/** Runs it with a place for temporary files that is its own. */
function bench(...args: readonly string[]) {
  return benchFor(0, ...args);
}

/** The same; asked to stop after so many milliseconds. */
function benchFor(timeout: number, ...args: readonly string[]) {
  const directory = mkdtempSync(join(tmpdir(), 'memtables-test-'));
  onTestFinished(() => rmSync(directory, { recursive: true }));
  const env = { ...process.env, TMPDIR: directory };
  const { status, stdout, stderr } = spawnSync(process.execPath, [BENCH, ...args], {
    ...{ encoding: 'utf8', env, timeout, killSignal: 'SIGTERM' },
  });
  return { status, stdout, stderr, left: readdirSync(directory) };
}

const number = expect.any(Number);
const measured = { reads: number, perSecond: number, tableLoads: number, turnaround: number, host: number };

describe('bench:events', () => {
  test.each(LIBRARIES)(
    'prints a summary that other programs can rely on, and leaves nothing: $library',
    ({ path }) => {
      const { status, stdout, stderr, left } = bench(
        ...['--json', '--seconds', '0.1', '--rounds', '2', '--libvmi', path],
      );
      expect([status, stderr]).toEqual([0, expect.not.stringContaining('kvmi-bare-listener')]);
      const records = stdout
        .trimEnd()
        .split('\n')
        .map((line) => JSON.parse(line));
      const round = {
        type: 'round',
        bare: measured,
        binding: measured,
        engine: { ...measured, handler: number },
      };
      expect(records).toEqual([
        { ...round, number: 1 },
        { ...round, number: 2 },
        {
          type: 'summary',
          perSecond: { engine: number, bare: number },
          ratio: number,
          microseconds: { host: number, library: number, ffi: number, engine: number },
        },
      ]);
      // The listeners trapped something, and the same kind of thing.
      for (const { bare, binding, engine } of records.slice(0, 2)) {
        for (const { reads, tableLoads } of [bare, binding, engine]) {
          expect(reads).toBeGreaterThan(0);
          expect(tableLoads).toBeGreaterThan(0);
        }
      }
      expect(left).toEqual([]);
    },
  );

  test('a library that is not there is said before a guest is started', () => {
    const { status, stderr, left } = bench('--libvmi', '/nowhere.so');
    expect(status).toBe(3);
    expect(stderr).toContain('[LIBRARY_NOT_LOADED]');
    expect(stderr).not.toContain('starting a guest');
    expect(left).toEqual([]);
  });
  test.each([500, 2000])('stopped after %i ms, it leaves nothing', (milliseconds) => {
    const { status, stderr, left } = benchFor(milliseconds);
    expect(status).toBe(1);
    expect(stderr).toContain('the benchmark was stopped before it was through [BENCH_FAILED]');
    expect(left).toEqual([]);
  });
});

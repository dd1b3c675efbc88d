import { existsSync, readdirSync, rmSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { describe, expect, onTestFinished, test } from 'vitest';
import { Command, temporaryDirectory } from '../cli/command.js';
import { LIBRARIES } from '../libvmi/libraries.js';

const BENCH = fileURLToPath(new URL('../../dist/bench/main.js', import.meta.url));

if (!existsSync(BENCH)) throw new Error('the benchmark is not built: run `npm run setup`');

/** The benchmark, with a place for temporary files that is its own. */
function bench(...args: readonly string[]) {
  const directory = temporaryDirectory();
  // With the log of the host, which says what is under way.
  const environment = { TMPDIR: directory, MEMTABLES_LOG: 'info' };
  const command = new Command(args, environment, undefined, BENCH);
  onTestFinished(() => {
    command.kill('SIGKILL');
    rmSync(directory, { recursive: true });
  });
  return { command, left: () => readdirSync(directory) };
}

const number = expect.any(Number);
const measured = { reads: number, perSecond: number, tableLoads: number, turnaround: number, host: number };

describe('bench:events', () => {
  test.each(LIBRARIES)(
    'prints a summary that other programs can rely on, and leaves nothing: $library',
    async ({ path }) => {
      const { command, left } = bench('--json', '--seconds', '0.1', '--rounds', '2', '--libvmi', path);
      expect([await command.ended, command.stderr]).toEqual([
        0,
        expect.not.stringContaining('kvmi-bare-listener'),
      ]);
      const round = {
        type: 'round',
        bare: measured,
        binding: measured,
        engine: { ...measured, handler: number },
      };
      expect(command.records).toEqual([
        { ...round, number: 1 },
        { ...round, number: 2 },
        {
          type: 'summary',
          perSecond: { engine: number, bare: number },
          ratio: number,
          microseconds: { host: number, library: number, ffi: number, engine: number },
        },
      ]);
      // Each listener trapped both kinds of reads.
      for (const { bare, binding, engine } of command.records.slice(0, 2) as Record<
        string,
        typeof measured
      >[]) {
        for (const { reads, tableLoads } of [bare!, binding!, engine!]) {
          expect(reads).toBeGreaterThan(0);
          expect(tableLoads).toBeGreaterThan(0);
          expect(tableLoads).toBeLessThan(1);
        }
      }
      expect(left()).toEqual([]);
    },
  );

  test('a library that is not there is said before a guest is started', async () => {
    const { command, left } = bench('--libvmi', '/nowhere.so');
    expect(await command.ended).toBe(3);
    expect(command.stderr).toContain('[LIBRARY_NOT_LOADED]');
    expect(command.stderr).not.toContain('starting a guest');
    expect(left()).toEqual([]);
  });

  test.each(['starting a guest', 'a tool has attached', 'the tool is gone'])(
    'stopped after "%s", it leaves nothing',
    async (said) => {
      const { command, left } = bench();
      await command.prints(said, 'stderr');
      command.kill('SIGTERM');
      expect(await command.ended).toBe(1);
      expect(command.stderr).toContain('the benchmark was stopped before it was through [BENCH_FAILED]');
      expect(left()).toEqual([]);
    },
  );
});

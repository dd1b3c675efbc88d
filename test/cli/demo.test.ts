import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync, rmSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { readGuestModule } from '../../src/guest/lexer-module.js';
import { type Command, start, temporaryDirectory } from './command.js';

// One directory for each test, so that what a demo leaves behind is seen.
let directory: string;
beforeEach(() => {
  directory = temporaryDirectory();
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

function demo(...args: string[]): Command {
  return start(['demo', ...args], { TMPDIR: directory });
}

/** The processes whose command line names our directory. */
function hosts(): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .filter((pid) => commandLine(pid).includes(directory))
    .map(Number);
}

function commandLine(pid: string): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8');
  } catch {
    return '';
  }
}

async function untilNoHostIsLeft(): Promise<void> {
  while (hosts().length > 0) await sleep(20);
}

async function theHost(): Promise<number> {
  for (;;) {
    const [pid] = hosts();
    if (pid !== undefined) return pid;
    await sleep(20);
  }
}

function expectNothingLeft(): void {
  expect(hosts()).toEqual([]);
  expect(readdirSync(directory)).toEqual([]);
}

const module = readGuestModule();
const count = expect.any(Number);
const FORM = { switches: count, readViolations: count };
const PHASE = {
  seconds: count,
  switches: count,
  readViolations: count,
  byForm: { 'one-level': FORM, 'two-level': FORM, 'look-alike': FORM, lexer: FORM },
  integritySweeps: count,
  lexerPieces: count,
};

function summaryOf(command: Command): Record<string, unknown> {
  return command.records.at(-1)!;
}

/** The last line, in exactly this shape. */
function summaryShape(options: { vcpus: number; seed: number; hooks: number }) {
  return {
    type: 'summary',
    ...options,
    phases: { unhooked: PHASE, hooked: PHASE, relocated: PHASE },
    relocations: count,
    encoders: expect.any(Object),
    sites: { listed: count, relocated: count, undecided: count },
    refused: expect.any(Object),
    staleEvents: count,
    cloakedReads: expect.any(Object),
    unload: {
      scans: count,
      blocked: count,
      inHandlerAtScan: count,
      evacuated: { vcpus: count, threads: count },
      seconds: count,
    },
    guest: {
      checksumOk: true,
      integritySweeps: count,
      integrityMismatches: 0,
      identicalAfterUnload: true,
      ...(module && {
        lexer: { pieces: count, passes: count, tokens: count, checksum: count, mismatches: 0 },
      }),
    },
  };
}

describe('the demo', () => {
  test('shows what it has to, and leaves nothing behind', async () => {
    const command = demo('--seconds', '1', '--seed', '20260', '--json');
    expect([await command.ended, command.stderr]).toEqual([0, expect.not.stringContaining('memtables:')]);
    const summary = summaryOf(command);
    expect(summary).toEqual(
      summaryShape({ vcpus: 2, seed: 20260, hooks: 7 + (module?.defaultHooks.length ?? 0) }),
    );
    // Not of every switch of the guest do the instructions stand together.
    const encoders = Object.entries(summary.encoders as Record<string, number>);
    expect(Object.fromEntries(encoders)).toMatchObject({ inline: count, lean: count, seed: count });
    expect(encoders.reduce((sum, [, count]) => sum + count, 0)).toBe(summary.relocations);
    expect(command.records.filter(({ type }) => type === 'phase').map(({ name }) => name)).toEqual([
      'unhooked',
      'hooked',
      'relocated',
    ]);
    expect(command.records.filter(({ type }) => type === 'relocated')).toHaveLength(
      summary.relocations as number,
    );
    expectNothingLeft();
  });

  test.each([1, 4])('with %i vCPUs and a hook of the user’s', async (vcpus) => {
    const hook = ['--hook', 'nt!NtCreateFile'];
    const command = demo(
      '--seconds',
      '0.3',
      '--seed',
      '4294967295',
      '--vcpus',
      `${vcpus}`,
      ...hook,
      ...['--handler', 'seed'],
      '--json',
    );
    expect([await command.ended, command.stderr]).toEqual([0, expect.not.stringContaining('memtables:')]);
    const summary = summaryOf(command);
    expect(summary).toEqual(summaryShape({ vcpus, seed: 4294967295, hooks: 1 }));
    expect(summary.encoders).toEqual({ seed: summary.relocations });
    expectNothingLeft();
  });

  test('as text', async () => {
    const columns = module ? 4 : 3;
    const command = demo('--seconds', '1', '--vcpus', '1', '--hook', 'nt!NtCreateFile');
    expect(await command.ended).toBe(0);
    // An unload may have to wait for a thread, or not.
    const lines = command.stdout.split('\n').filter((line) => !line.startsWith('waiting for threads'));
    expect(lines[0]).toMatch(/^unhooked: [\d,]+ switches\/s, [\d,]+ integrity sweeps?$/);
    // What happens to dozens of table loads is counted, not told.
    expect(lines.slice(1, 4).map((line) => line.split(/:? /)[0])).toEqual(['hooked', 'hooked', 'relocated']);
    expect(lines.slice(4, 8)).toEqual([
      '',
      expect.stringMatching(module ? /^ +one-level +two-level +look-alike +lexer$/ : /^ .* look-alike$/),
      expect.stringMatching(new RegExp(`^ +(switches/s +trapped *){${columns}}$`)),
      expect.stringMatching(new RegExp(`^unhooked +([\\d,]+ +0 *){${columns}}$`)),
    ]);
    expect(lines.slice(8, 10)).toEqual([
      expect.stringMatching(new RegExp(`^hooked( +[\\d,]+){${2 * columns}}$`)),
      expect.stringMatching(new RegExp(`^relocated( +[\\d,]+){${2 * columns}}$`)),
    ]);
    expect(command.stdout).toMatch(
      module ? /\nthe lexer of .*, the same in every phase\n/ : /\nno real code ran .*`npm run binaries`/,
    );
    expect(command.stdout).toMatch(
      /\n1 hook hidden, \d+ switch(es)? relocated \((inline|fused|lean) \d+.*\); left alone: /,
    );
    expect(command.stdout).toMatch(
      /checksums right, [\d,]+ integrity sweeps? with 0 mismatches, identical after unload\n$/,
    );
    expect(command.stderr).toContain("phase 'relocated'");
  });
});

describe('a demo that goes wrong leaves no host and no files:', () => {
  test('a hook that cannot be placed', async () => {
    const command = demo('--seconds', '0.1', '--hook', 'nt!NtQueryEaFile');
    expect(await command.ended).toBe(6);
    expect(command.stderr).toContain('[HOOK_REFUSED]');
    expectNothingLeft();
  });

  test('a hook that the profile does not have: nothing is measured before', async () => {
    const command = demo('--hook', 'nt!NoSuchFunction');
    expect(await command.ended).toBe(5);
    expect(command.stderr).toContain('[SYMBOL_NOT_FOUND]');
    expect(command.stderr).not.toContain('phase');
    expectNothingLeft();
  });

  test('a library that is not there', async () => {
    const command = demo('--libvmi', '/nowhere.so');
    expect(await command.ended).toBe(3);
    expect(command.stderr).toContain('[LIBRARY_NOT_LOADED]');
    expectNothingLeft();
  });

  test('the host is killed', async () => {
    const command = demo('--seconds', '30');
    await command.prints("phase 'unhooked'", 'stderr');
    process.kill(await theHost(), 'SIGKILL');
    expect(await command.ended).toBe(4);
    expect(command.stderr).toContain('[HYPERVISOR_GONE]');
    expectNothingLeft();
  });

  test.each(['SIGINT', 'SIGTERM'] as const)('%s while the guest boots', async (signal) => {
    const command = demo();
    await theHost();
    command.kill(signal);
    expect(await command.ended).toBe(1);
    expect(command.stderr).toContain('the demo was stopped before it was through [DEMO_FAILED]');
    expectNothingLeft();
  });

  test('SIGTERM while hooks are in place', async () => {
    const command = demo('--seconds', '2', '--json');
    await command.prints('"type":"hooked"');
    command.kill('SIGTERM');
    expect(await command.ended).toBe(1);
    expect(command.stderr).toContain('[DEMO_FAILED]');
    expectNothingLeft();
  });

  test('its reader goes away', async () => {
    const command = demo('--seconds', '0.5');
    await command.prints("phase 'unhooked'", 'stderr');
    command.process.stdout?.destroy();
    expect(await command.ended).toBe(1);
    expect(command.stderr).toContain('[DEMO_FAILED]');
    expect(command.stderr).toContain('cause: write EPIPE');
    expect(command.stderr).not.toContain("phase 'relocated'");
    expectNothingLeft();
  });

  test('it is killed: the host ends by itself', async () => {
    const command = demo('--seconds', '30');
    await command.prints("phase 'unhooked'", 'stderr');
    command.kill('SIGKILL');
    await command.ended;
    await untilNoHostIsLeft();
  });

  test('Ctrl-C in a terminal reaches the demo alone, which needs its guest to unload', async () => {
    const command = demo('--seconds', '30');
    await command.prints("phase 'unhooked'", 'stderr');
    const group = (pid: number | undefined) =>
      execFileSync('ps', ['-o', 'pgid=', '-p', `${pid}`], { encoding: 'utf8' });
    expect(group(await theHost())).not.toBe(group(command.process.pid));
    command.kill('SIGINT');
    expect(await command.ended).toBe(1);
    expect(command.stderr).not.toContain('gone away');
    expectNothingLeft();
  });
});

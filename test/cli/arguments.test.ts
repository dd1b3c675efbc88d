import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { EXIT, EXIT_MEANINGS } from '../../src/cli/exit-codes.js';
import { IMAGE, run } from './command.js';

const ATTACH = ['attach', '-n', 'x', '-s', '/tmp/x', '-j', 'x.json'];
const README = readFileSync(new URL('../../README.md', import.meta.url), 'utf8');

describe('an argument that cannot be is said on stderr, before anything is done:', () => {
  test.each([
    { args: [], says: 'Usage: memtables' },
    { args: ['fly'], says: "unknown command 'fly'" },
    { args: ['demo', '--fast'], says: "unknown option '--fast'" },
    { args: ['demo', 'now'], says: 'too many arguments' },
    { args: ['demo', '--vcpus', '0'], says: 'Expected a whole number from 1 to 8' },
    { args: ['demo', '--vcpus', '2.5'], says: 'Expected a whole number from 1 to 8' },
    { args: ['demo', '--seconds', '0'], says: 'Expected a number of seconds' },
    { args: ['demo', '--seconds', '1e9'], says: 'Expected a number of seconds' },
    { args: ['demo', '--seed', '4294967296'], says: 'from 0 to 4294967295' },
    { args: ['demo', '--handler', 'fast'], says: 'Allowed choices are auto, seed, lean, fused' },
    { args: ['demo', '--hook', 'NtCreateFile'], says: 'Write nt!Name' },
    { args: ['demo', '--hook', 'nt!'], says: 'Write nt!Name' },
    { args: ['host'], says: "required option '--socket <path>' not specified" },
    { args: ['host', '--socket', '/tmp/x', '--memory', '1'], says: 'from 32 to 4096' },
    { args: ['attach'], says: "required option '-n, --name <name>' not specified" },
    { args: ATTACH, says: 'what to do: Name at least one function of the kernel: --hook nt!Name.' },
    {
      args: [...ATTACH, '--xen', '--hook', 'nt!A'],
      says: 'name the socket (-s), for one on Xen write --xen',
    },
    { args: ['attach', '-n', 'x', '-j', 'x.json', '--hook', 'nt!A'], says: 'name the socket (-s)' },
    { args: [...ATTACH, '--hook', 'nt!A', '--hook', 'nt!A'], says: 'Name each function once' },
    { args: [...ATTACH, '--hook', 'nt!A', '-t', 'soon'], says: 'Expected a number of seconds' },
    { args: [...ATTACH, '--hook', 'nt!A', '--stuck-after', '0'], says: 'Expected a number of seconds' },
    { args: [...ATTACH, '--hook', 'nt!A', '--threshold', '-1'], says: 'from 1 to 1000000' },
    { args: ['scan'], says: "missing required argument 'files'" },
    { args: ['scan', '/nowhere.exe'], says: '[FILE_UNREADABLE]' },
  ])('memtables $args', async ({ args, says }) => {
    const { code, stdout, stderr } = await run(args);
    expect(stderr).toContain(says);
    expect(stdout).toBe('');
    expect(code).toBe(EXIT.usage);
  });
});

describe('help', () => {
  test.each([[], ['demo'], ['host'], ['attach'], ['scan']])(
    'of %s names every exit code',
    async (...args) => {
      const { code, stdout, stderr } = await run([...args, '--help']);
      expect([code, stderr]).toEqual([0, '']);
      for (const [number, meaning] of Object.entries(EXIT_MEANINGS)) {
        expect(stdout).toContain(`  ${number}  ${meaning}\n`);
      }
      if (args.length > 0) expect(stdout).toMatch(/Examples?(, in two terminals)?:\n {2}memtables /);
    },
  );

  test('the exit codes of the README are those of the program', () => {
    const rows = [...README.matchAll(/^\| (\d) \| (.*) \|$/gm)].map(([, code, meaning]) => [code, meaning]);
    expect(rows).toEqual(Object.entries(EXIT_MEANINGS));
  });

  test('the README names no option that a command does not have', async () => {
    const texts = await Promise.all(
      ['demo', 'host', 'attach', 'scan'].map(async (name) => (await run([name, '--help'])).stdout),
    );
    const known = new Set(texts.join('\n').match(/--[a-z-]+/g));
    const lines = README.match(/^(node dist\/cli\/main\.js|memtables) .*(\\\n.*)*/gm) ?? [];
    const used = lines.join('\n').match(/--[a-z-]+/g) ?? [];
    expect(used.length).toBeGreaterThan(5);
    expect(used.filter((option) => !known.has(option))).toEqual([]);
  });
});

describe('the log', () => {
  test('a level that is none is said, and is no failure', async () => {
    const { code, stderr } = await run(['scan', '/nowhere.exe'], { MEMTABLES_LOG: 'loud' });
    expect(stderr).toContain("MEMTABLES_LOG is 'loud', which is none of trace, debug");
    expect(code).toBe(EXIT.usage);
  });
});

describe('results that cannot be written', () => {
  test('are an error, not a success', async () => {
    const { code, stderr } = await run(['scan', IMAGE], {}, 'exec >/dev/full');
    expect(stderr).toContain('the results could not be written');
    expect(code).toBe(EXIT.usage);
  });

  test('because their reader has enough are none', async () => {
    const { code, stderr } = await run(['scan', IMAGE, '--json'], {}, 'exec > >(head -1 >/dev/null)');
    expect([code, stderr]).toEqual([EXIT.ok, '']);
  });
});

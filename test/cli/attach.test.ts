import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import { Host, PROFILE, run, start } from './command.js';

let host: Host;
beforeAll(async () => {
  host = await Host.start();
});
afterEach(() => host.expectAsFound());
afterAll(() => host.stop());

const HOOK = ['--hook', 'nt!NtQuerySystemInformation'];

/** A file of our own in the host's directory. */
function file(name: string, text: string | Buffer): string {
  const path = join(host.directory, name);
  writeFileSync(path, text);
  return path;
}

/** The arguments of `attach`, with another profile. */
function withProfile(profile: string): string[] {
  return ['attach', '-n', 'embedded', '-s', host.socket, '-j', profile, ...HOOK];
}

describe('attach', () => {
  test('prints a line for each thing that happened, and a summary, and leaves the guest as found', async () => {
    const command = start(host.attach(...HOOK, '--hook', 'nt!NtCreateFile', '--handler', 'seed', '--json'));
    await command.prints('"relocated"');
    command.kill('SIGINT');
    expect(await command.ended).toBe(0);
    const { records } = command;
    expect(records[0]).toMatchObject({
      type: 'attached',
      pdb: 'ntkrnlmp.pdb',
      vcpus: 2,
      modules: expect.any(Number),
    });
    expect(records.filter(({ type }) => type === 'hooked').map(({ name }) => name)).toEqual([
      'nt!NtQuerySystemInformation',
      'nt!NtCreateFile',
    ]);
    const relocated = records.filter(({ type }) => type === 'relocated');
    expect(records.at(-1)).toMatchObject({ type: 'summary', hooks: 2, relocations: relocated.length });
    expect(relocated[0]).toMatchObject({
      site: expect.stringMatching(/^0x[0-9a-f]{16}$/),
      handlers: expect.arrayContaining([
        expect.objectContaining({ gva: expect.stringMatching(/^0x[0-9a-f]{16}$/) }),
      ]),
      encoder: 'seed',
    });
  });

  test('relocates ahead what the hooks make trap, and prints the pages first', async () => {
    const command = start(host.attach(...HOOK, '--ahead', '--threshold', '1000000', '--json'));
    await command.prints('"relocated"');
    command.kill('SIGINT');
    expect(await command.ended).toBe(0);
    const [, hooked, planned, relocated] = command.records;
    expect([hooked, relocated]).toMatchObject([{ type: 'hooked' }, { type: 'relocated' }]);
    expect(planned).toEqual({
      type: 'planned',
      pages: expect.arrayContaining([expect.stringMatching(/^0x[0-9a-f]{13}000$/)]),
      switches: expect.any(Number),
    });
    expect(planned!.switches).toBeGreaterThan(0);
  });

  test('ends by itself after -t; an empty MEMTABLES_LIBVMI names no library', async () => {
    const { code, stdout } = await run(host.attach(...HOOK, '-t', '0.2', '--no-relocate'), {
      MEMTABLES_LIBVMI: '',
    });
    expect(code).toBe(0);
    expect(stdout).toMatch(/^attached: .*\nhooked nt!NtQuerySystemInformation at 0x.*\nunloaded in /);
    expect(stdout).not.toContain('relocated one-level');
  });
});

describe('a hook is refused, and the hook before it is taken back:', () => {
  test.each([
    ...readGuestArtefacts().sites.unhookable.map(({ function: name }) => name),
    'NtQueryEaFile',
    'NtBuildNumber',
  ])('%s', async (name) => {
    const { code, stdout, stderr } = await run(host.attach(...HOOK, '--hook', `nt!${name}`));
    expect(stdout).toContain('hooked nt!NtQuerySystemInformation');
    expect(stderr).toContain(`memtables: nt!${name} cannot be hooked: `);
    expect(stderr).toMatch(
      / {2}reason: (call|branch|branch-target|too-short|pageable|not-code), which means: .+\n/,
    );
    expect(stderr).toContain('what to do: ');
    expect(code).toBe(6);
  });
});

describe('what is wrong is said before anything waits for the hypervisor:', () => {
  test('a function that the profile does not have, with what there is', async () => {
    const { code, stderr } = await run(host.attach(...HOOK, '--hook', 'nt!NtCreatefile'));
    expect(stderr).toContain('no symbol NtCreatefile [SYMBOL_NOT_FOUND]');
    expect(stderr).toContain('what to do: Check the spelling; there is NtCreateFile.');
    expect(stderr).not.toContain('waiting');
    expect(code).toBe(5);
  });

  test.each([
    ['a library', ['--libvmi', '/nowhere.so'], 'LIBRARY_NOT_LOADED'],
    ['a journal', ['--journal', '/nowhere/journal'], 'JOURNAL_FAILED'],
    ['a socket', ['-s', '/nowhere/kvmi'], 'INVALID_ARGUMENT'],
    ['a profile', ['-j', '/nowhere.json'], 'FILE_UNREADABLE'],
  ])('%s', async (_what, args, code) => {
    const { stderr } = await run([...host.attach(...HOOK), ...args]);
    expect(stderr).toContain(`[${code}]`);
    expect(stderr).not.toContain('waiting');
  });
});

describe('a profile that cannot be used leaves the guest alone:', () => {
  test('of another kernel', async () => {
    const profile = JSON.parse(readFileSync(PROFILE, 'utf8'));
    profile.metadata.windows.pdb.GUID = '00000000000000000000000000000001';
    const { code, stderr } = await run(withProfile(file('other.json', JSON.stringify(profile))));
    expect(stderr).toContain('[PROFILE_MISMATCH]');
    expect(code).toBe(5);
  });

  test('that is cut short', async () => {
    const text = readFileSync(PROFILE, 'utf8').slice(0, 5000);
    const { code, stderr } = await run(withProfile(file('profile.json', text)));
    expect(stderr).toMatch(/profile\.json.*\[PROFILE_INVALID\]/);
    expect(code).toBe(5);
  });

  test('that is not there', async () => {
    const { code, stderr } = await run(withProfile(join(host.directory, 'missing.json')));
    expect(stderr).toMatch(/missing\.json.*\[FILE_UNREADABLE\]/);
    expect(code).toBe(2);
  });
});

describe('a journal that cannot be written leaves the guest alone:', () => {
  test('in a directory that is not there', async () => {
    const path = join(host.directory, 'missing', 'journal');
    const { code, stderr } = await run(host.attach(...HOOK, '--journal', path));
    expect(stderr).toContain('[JOURNAL_FAILED]');
    expect(stderr).toContain('what to do: Choose another place for the journal (--journal PATH)');
    expect(code).toBe(3);
  });

  test('a file that is no journal is kept', async () => {
    const path = file('precious', '{"precious":true}\n');
    const { code, stderr } = await run(host.attach(...HOOK, '--journal', path));
    expect(stderr).toContain(`${path} is not a journal of memtables [JOURNAL_FAILED]`);
    expect(stderr).toContain('what to do: Move the file away');
    expect(code).toBe(3);
    expect(readFileSync(path, 'utf8')).toBe('{"precious":true}\n');
  });

  test('a disk that gets full: what is in the guest by then is taken back', async () => {
    // A journal of two hooks is longer than a block of 512 or 1024 bytes.
    const hooks = ['--hook', 'nt!NtCreateFile', '--hook', 'nt!NtWriteFile', '--hook', 'nt!NtReadFile'];
    const command = start(host.attach(...HOOK, ...hooks), {}, 'ulimit -f 1');
    expect(await command.ended).toBe(3);
    expect(command.stdout).toContain('hooked nt!NtQuerySystemInformation');
    expect(command.stderr).toContain('[JOURNAL_FAILED]');
    expect(command.stderr).toContain('cause: EFBIG');
  });
});

describe('results', () => {
  test('a reader that goes away early ends the run, and the guest is as found', async () => {
    const command = start(host.attach(...HOOK, '--hook', 'nt!NtCreateFile', '--json'));
    await command.prints('"attached"');
    command.process.stdout?.destroy();
    expect(await command.ended).toBe(0);
    expect(command.stderr).not.toMatch(/EPIPE|internal error/);
    expect(command.stderr).toContain('unloading');
  });

  test('a reader of the log that goes away changes nothing', async () => {
    const command = start(host.attach(...HOOK, '-t', '0.5'));
    command.process.stderr?.destroy();
    expect(await command.ended).toBe(0);
    expect(command.stdout).toContain('unloaded in');
  });
});

describe('a socket that cannot be used:', () => {
  function attachOn(socket: string): string[] {
    return ['attach', '-n', 'embedded', '-s', socket, '-j', PROFILE, ...HOOK];
  }

  test('in a directory that is not there', async () => {
    const { code, stderr } = await run(attachOn('/nowhere/kvmi'));
    expect(stderr).toContain('/nowhere, which is not a directory [INVALID_ARGUMENT]');
    expect(stderr).toContain('what to do: Create the directory.');
    expect(code).toBe(2);
  });

  test('another process listens on it', async () => {
    const directory = join(host.directory, 'used');
    mkdirSync(directory);
    const socket = join(directory, 'kvmi');
    const server = createServer();
    await new Promise<void>((resolve) => server.listen(socket, resolve));
    try {
      const { code, stderr } = await run(attachOn(socket));
      expect(stderr).toContain(`another process listens on ${socket} [ATTACH_FAILED]`);
      expect(stderr).toContain('what to do: End the other introspection tool');
      expect(code).toBe(3);
      expect(existsSync(socket)).toBe(true);
    } finally {
      await new Promise((resolve) => server.close(resolve));
    }
  });
});

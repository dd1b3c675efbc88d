import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import { loadGuest } from '../../src/guest/loader.js';
import { serveGuest } from '../../src/host/host.js';
import { StatisticsClient } from '../../src/host/statistics-client.js';
import { createMachine } from '../../src/machine/create-machine.js';
import { PeImage } from '../../src/nt/pe.js';
import { findSlack } from '../../src/slack/regions.js';
import { Command, Host, PROFILE, run, start, temporaryDirectory } from './command.js';

const HOOK = ['--hook', 'nt!NtQuerySystemInformation'];

async function startHost(): Promise<Host> {
  const host = await Host.start();
  onTestFinished(() => host.stop());
  return host;
}

/** Attaches and waits until changes are in the guest. */
async function attached(host: Host, ...more: string[]): Promise<Command> {
  const command = start(host.attach(...HOOK, ...more));
  await command.prints('relocated');
  return command;
}

/** What a journal lists and does not say was undone. */
function changesIn(journal: string): Record<string, unknown>[] {
  const lines = readFileSync(journal, 'utf8').trimEnd().split('\n');
  const entries = lines.map((line) => JSON.parse(line));
  const undone = entries.filter(({ type }) => type === 'undone').map(({ id }) => id);
  return entries.filter(({ type, id }) => type === 'write' && !undone.includes(id));
}

/** How many changes are left, and the first of them: where, and what to put back. */
function expectToList(stderr: string, journal: string): void {
  const count = /; (\d+) changes are still in the guest; (.*) lists them \[/.exec(stderr);
  expect(count?.[2]).toBe(journal);
  const left = changesIn(journal);
  expect(Number(count?.[1])).toBe(left.length);
  expect(left[0]).toMatchObject({ owner: 'code of nt!NtQuerySystemInformation' });
  const gpa = String(left[0]!.gpa).replace(/^0x/, '0x0*');
  expect(stderr).toMatch(
    new RegExp(
      `\n  inGuest: ${left.length}\n    gpa ${gpa}, length \\d+, before [0-9a-f]+…?, owner code of nt!`,
    ),
  );
}

describe('the hypervisor', () => {
  // It takes ten seconds to notice: it runs while the other tests do.
  const directory = temporaryDirectory();
  const socket = join(directory, 'kvmi');
  const lonely = new Command(['attach', '-n', 'x', '-s', socket, '-j', PROFILE, ...HOOK]);
  afterAll(() => rmSync(directory, { recursive: true }));

  test('is killed while changes are in the guest', async () => {
    const host = await startHost();
    const command = await attached(host);
    host.command.kill('SIGKILL');
    expect(await command.ended).toBe(4);
    expect(command.stderr).toContain('[HYPERVISOR_GONE]');
    expect(command.stderr).toContain('what to do: Restart the guest, or put the bytes back');
    expectToList(command.stderr, host.journal);
  });

  test('stops answering: that is said without being asked, and the process ends although a call does not', async () => {
    const host = await startHost();
    const command = await attached(host, '--stuck-after', '2');
    host.command.kill('SIGSTOP');
    expect(await command.ended).toBe(4);
    expect(command.stderr).toMatch(/vmi_\w+ has not returned for \d+ ms; .* \[HYPERVISOR_STUCK\]/);
    expect(command.stderr).toContain('  limitMs: 2000\n');
    expectToList(command.stderr, host.journal);
    // What the library says when its call does return.
    expect(command.stderr).not.toContain('left command');
    host.command.kill('SIGCONT');
    await host.expectReleased();
  });

  test('does not connect', async () => {
    expect(await lonely.ended).toBe(3);
    expect(lonely.stderr).toContain('[ATTACH_FAILED]');
    expect(lonely.stderr).toContain(`what to do: Start the hypervisor so that it connects to ${socket}`);
    expect(existsSync(socket)).toBe(false);
  });
});

describe('a tool that is killed', () => {
  test('leaves a journal, the guest is released, and the next one says what to do', async () => {
    const host = await startHost();
    const command = await attached(host);
    command.kill('SIGKILL');
    await command.ended;
    await host.expectReleased();
    const left = readFileSync(host.journal);
    expect(changesIn(host.journal)[0]).toMatchObject({
      owner: 'code of nt!NtQuerySystemInformation',
      gpa: expect.stringMatching(/^0x/),
      before: expect.stringMatching(/^(00)+$/),
    });

    // A change is not gone because the guest has changed a byte of it.
    const edited = left.toString().replace(/"after":"../g, '"after":"0f');
    expect(edited).not.toBe(left.toString());
    writeFileSync(host.journal, edited);

    const next = await run(host.attach(...HOOK));
    expect(next.stderr).toContain("an earlier run's changes are still in the guest");
    expect(next.stderr).toContain('[JOURNAL_FAILED]');
    expect(next.stderr).toContain('what to do: Restart the guest, or put the bytes back');
    expect(next.code).toBe(3);
    expect(readFileSync(host.journal, 'utf8')).toBe(edited);
    await host.expectReleased();
  });

  test('leaves a journal that is of no concern to a guest that was restarted', async () => {
    const host = await startHost();
    const path = join(host.directory, 'old');
    const header = '{"type":"journal","version":1,"guest":"embedded","kernelBase":"0x1000","pdb":"x"}';
    const write = {
      type: 'write',
      id: 1,
      owner: 'x',
      gpa: '0x1000',
      before: '0badf00d01',
      after: 'e90badf00d',
    };
    writeFileSync(path, `${header}\n${JSON.stringify(write)}\n`);
    const { code } = await run(host.attach(...HOOK, '-t', '0.1', '--journal', path));
    expect(code).toBe(0);
    expect(existsSync(path)).toBe(false);
    await host.expectAsFound();
  });
});

describe('slack', () => {
  test('that is used up: the hook is refused and the guest is as found', async () => {
    const directory = temporaryDirectory();
    onTestFinished(() => rmSync(directory, { recursive: true }));
    const socket = join(directory, 'kvmi');
    const artefacts = readGuestArtefacts();
    const machine = createMachine({ vcpus: 1, memoryBytes: 64 << 20 });
    const guest = loadGuest(machine, { image: artefacts.image, hal: artefacts.hal, seed: 3 });
    const gpaOf = (gva: bigint) => guest.translate(gva)!;
    const slackOf = (base: bigint, image: Buffer) =>
      findSlack(base, PeImage.fromFile(image).sections, (gva, size) =>
        machine.readPhysical(gpaOf(gva), size),
      );
    const [nt, hal] = [slackOf(guest.kernelBase, artefacts.image), slackOf(guest.hal.base, artefacts.hal)];
    for (const slack of [nt, hal]) expect(slack.length).toBeGreaterThan(0);
    for (const { gva, size } of [...nt, ...hal]) {
      for (let at = gva; at < gva + BigInt(size); at++) machine.writePhysical(gpaOf(at), Buffer.of(0xcc));
    }
    machine.setTimer(0xd1, 1000);
    const stop = new AbortController();
    const served = serveGuest(machine, guest, artefacts, { socket, signal: stop.signal });
    try {
      const client = await StatisticsClient.connect(`${socket}.stats`);
      const before = await client.image();
      const { code, stderr } = await run(['attach', '-n', 'x', '-s', socket, '-j', PROFILE, ...HOOK]);
      expect(stderr).toContain('[SLACK_EXHAUSTED]');
      expect(stderr).toContain('what to do: ');
      expect(code).toBe(6);
      expect(before.equals(await client.image())).toBe(true);
      expect(await client.statistics()).toMatchObject({ restrictedFrames: 0, outstandingEvents: 0 });
      client.close();
    } finally {
      stop.abort();
      await served;
      machine.close();
    }
  });
});

/** The bundled library, except that writes to the guest fail: those from the one that `FAIL_FROM` names, and `FAIL_ONE`. */
const FAILING = `
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
typedef uint32_t (*write_pa)(void *, uint64_t, size_t, void *, size_t *);
static int left(const char *variable, int count) { return getenv(variable) ? atoi(getenv(variable)) - count : 1; }
uint32_t vmi_write_pa(void *vmi, uint64_t at, size_t size, void *bytes, size_t *done) {
  static int count;
  count++;
  if (left("FAIL_ONE", count) == 0 || left("FAIL_FROM", count) <= 0) return 1;
  return ((write_pa)dlsym(dlopen(getenv("BUNDLED"), RTLD_NOW), "vmi_write_pa"))(vmi, at, size, bytes, done);
}`;
const BUNDLED = fileURLToPath(new URL('../../build/Release/kvmi.so', import.meta.url));

const compiler = spawnSync('cc', ['--version']).status === 0;
if (!compiler) {
  // biome-ignore lint/suspicious/noConsole: a skip has to be seen
  console.warn('SKIPPED: "a library with another ABI" and "undoing fails too" need a C compiler (cc)');
}

describe.skipIf(!compiler)('undoing fails too, after', () => {
  /** A hook that is placed takes two writes. */
  async function attachAndFail(env: Readonly<Record<string, string>>, hook: string) {
    const host = await startHost();
    const library = join(host.directory, 'failing.so');
    const linked = ['-x', 'none', `-Wl,--no-as-needed,-rpath,${dirname(BUNDLED)}`, BUNDLED, '-ldl'];
    const build = ['-shared', '-fPIC', '-x', 'c', '-', ...linked, '-o', library];
    execFileSync('cc', build, { input: FAILING });
    const args = host.attach(...HOOK, '--hook', hook, '--no-relocate', '--libvmi', library);
    const result = await run(args, { BUNDLED, ...env });
    expectToList(result.stderr, host.journal);
    await host.expectReleased();
    return result;
  }

  test('a hook was refused: the guest still holds the one before it, which is what counts', async () => {
    const { code, stderr } = await attachAndFail({ FAIL_FROM: '3' }, 'nt!NtQueryEaFile');
    expect(stderr).toMatch(
      /^memtables: what is in the guest could not be taken back; .* \[ROLLBACK_FAILED\]$/m,
    );
    expect(stderr).toContain('cause: nt!NtQueryEaFile cannot be hooked: pageable [HOOK_REFUSED]');
    expect(code).toBe(7);
  });

  test('the hypervisor had failed while a hook was placed', async () => {
    const { code, stderr } = await attachAndFail({ FAIL_ONE: '3', FAIL_FROM: '5' }, 'nt!NtCreateFile');
    expect(stderr).toMatch(/could not be taken back; .* \[ROLLBACK_FAILED\]$/m);
    expect(stderr).toMatch(/ {2}cause: .*vmi_write_pa.* \[HYPERVISOR_FAILED\]/);
    expect(code).toBe(7);
  });
});

describe('the library', () => {
  let directory: string;
  beforeAll(() => {
    directory = temporaryDirectory();
  });
  afterAll(() => rmSync(directory, { recursive: true }));

  function attachWith(library: string): string[] {
    return ['attach', '-n', 'x', '-s', join(directory, 'kvmi'), '-j', PROFILE, ...HOOK, '--libvmi', library];
  }

  test('is not there', async () => {
    const { code, stderr } = await run(attachWith('/nowhere/libvmi.so'));
    expect(stderr).toMatch(
      /^memtables: \/nowhere\/libvmi\.so could not be loaded: .* \[LIBRARY_NOT_LOADED\]$/m,
    );
    expect(stderr).toContain('what to do: Check --libvmi and MEMTABLES_LIBVMI, and');
    expect(stderr).toContain(
      'needed is libvmi 0.15 (events version 9), built with its KVM driver and events',
    );
    expect(code).toBe(3);
  });

  test('has a name without a slash, which the linker looks for elsewhere', async () => {
    const { code, stderr } = await run(attachWith('mine.so'));
    expect(stderr).toContain(
      'what to do: Check --libvmi and MEMTABLES_LIBVMI (a file in this folder is ./mine.so)',
    );
    expect(code).toBe(3);
  });

  test('is another file', async () => {
    const { code, stderr } = await run(attachWith(PROFILE));
    expect(stderr).toContain('[LIBRARY_NOT_LOADED]');
    expect(code).toBe(3);
  });

  test('for Xen is never the one for KVM, which cannot speak to it', async () => {
    const { code, stderr } = await run(['attach', '-n', 'x', '--xen', '-j', PROFILE, ...HOOK], {
      LD_LIBRARY_PATH: '',
    });
    expect(stderr).not.toContain('kvmi.so');
    expect(stderr).toContain('built with its Xen driver');
    expect(code).toBe(3);
  });

  test('without a driver for Xen does not attach there', async () => {
    const args = ['attach', '-n', 'x', '--xen', '-j', PROFILE, ...HOOK, '--libvmi', BUNDLED];
    const { code, stderr } = await run(args);
    expect(stderr).toContain('memtables: could not attach to x on Xen: ');
    expect(stderr).toContain('built with its Xen driver and events');
    expect(code).toBe(3);
  });

  test.skipIf(!compiler)('a library with another ABI', async () => {
    const library = join(directory, 'other.so');
    const source = 'unsigned vmi_events_version(void) { return 8; }';
    execFileSync('cc', ['-shared', '-fPIC', '-x', 'c', '-', '-o', library], { input: source });
    const { code, stderr } = await run(attachWith(library));
    expect(stderr).toContain(
      "has version 8 of libvmi's events; only version 9 is known [LIBRARY_INCOMPATIBLE]",
    );
    expect(stderr).toContain('what to do: Name libvmi 0.15 (events version 9), built with its KVM driver');
    expect(code).toBe(3);
    expect(existsSync(join(directory, 'kvmi'))).toBe(false);
  });
});

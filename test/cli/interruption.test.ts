import { existsSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import { Host, PROFILE, run, start, temporaryDirectory } from './command.js';

const HOOKS = ['--hook', 'nt!NtQuerySystemInformation', '--hook', 'nt!NtCreateFile'];

describe('a command that is stopped', () => {
  let host: Host;
  beforeAll(async () => {
    host = await Host.start();
  });
  afterAll(() => host.stop());

  test.each(['SIGINT', 'SIGTERM', 'SIGHUP'] as const)(
    'by %s while it waits for the hypervisor ends at once and leaves no socket',
    async (signal) => {
      const directory = temporaryDirectory();
      onTestFinished(() => rmSync(directory, { recursive: true }));
      const socket = join(directory, 'kvmi');
      const command = start(['attach', '-n', 'x', '-s', socket, '-j', PROFILE, ...HOOKS]);
      while (!existsSync(socket)) await sleep(10);
      command.kill(signal);
      expect(await command.ended).toBe(0);
      expect(command.stderr).toContain('the guest was not touched');
      // Had it not ended before libvmi's call did, that call would have said so.
      expect(command.stderr).not.toContain('no hypervisor connected');
      expect(existsSync(socket)).toBe(false);
    },
  );

  test.each(['SIGINT', 'SIGTERM'] as const)('by %s right after it has attached', async (signal) => {
    const command = start(host.attach(...HOOKS, '--json'));
    await command.prints('"attached"');
    command.kill(signal);
    expect(await command.ended).toBe(0);
    expect(command.records.at(-1)).toMatchObject({ type: 'summary' });
    await host.expectAsFound();
  });

  test('while the hypervisor connects: at any moment, the guest is as found', async () => {
    for (const ms of [0, 30, 60, 100, 150, 200]) {
      const command = start(host.attach(...HOOKS));
      await command.prints('waiting for the hypervisor', 'stderr');
      await sleep(ms);
      command.kill('SIGINT');
      expect(await command.ended).toBe(0);
      await host.expectReleased();
      expect(host.image.equals(await host.client.image())).toBe(true);
    }
  });

  test.each(['SIGINT', 'SIGTERM'] as const)('by %s while it relocates under load', async (signal) => {
    const command = start(host.attach(...HOOKS, '--threshold', '1'));
    await command.prints('relocated');
    command.kill(signal);
    expect(await command.ended).toBe(0);
    expect(command.stdout).toContain('unloaded in');
    await host.expectAsFound();
  });

  test('a second time: ends at once, or has been unloaded by then; the journal says which', async () => {
    const command = start(host.attach(...HOOKS));
    await command.prints('relocated');
    command.kill('SIGINT');
    await command.prints('unloading', 'stderr');
    command.kill('SIGINT');
    const code = await command.ended;
    const { restrictedFrames } = await host.expectReleased();
    expect(restrictedFrames).toBe(0);
    const asFound = host.image.equals(await host.client.image());
    // Node takes no more signals while it ends: the second one may kill what had been unloaded.
    const isUnloaded = code === 0 || (code === 'SIGINT' && command.stdout.includes('unloaded in'));
    if (isUnloaded) expect(asFound).toBe(true);
    else expect([code, command.stderr]).toEqual([7, expect.stringContaining('ended without unloading')]);
    // A journal that lists nothing that is left does not stand in the way.
    if (!asFound) expect(existsSync(host.journal)).toBe(true);
    const next = await run(host.attach(...HOOKS, '-t', '0.1'));
    expect(next.code).toBe(asFound ? 0 : 3);
  });
});

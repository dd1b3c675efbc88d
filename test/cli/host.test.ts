import { existsSync, mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { StatisticsClient } from '../../src/host/statistics-client.js';
import { run, start, temporaryDirectory } from './command.js';

let directory: string;
beforeEach(() => {
  directory = temporaryDirectory();
});
afterEach(() => rmSync(directory, { recursive: true }));

describe('the host', () => {
  test.each(['SIGINT', 'SIGTERM', 'SIGHUP'] as const)(
    'ends on %s and leaves nothing behind',
    async (signal) => {
      const socket = join(directory, 'kvmi');
      const command = start(['host', '--socket', socket, '--seed', '1', '--vcpus', '1']);
      while (!existsSync(`${socket}.stats`)) await sleep(10);
      command.kill(signal);
      expect(await command.ended).toBe(0);
      expect(existsSync(`${socket}.stats`)).toBe(false);
      expect(command.stderr).toContain('starting a guest with 1 vCPU, seed 1\n');
      expect(command.stderr).toContain(`waiting for a tool on ${socket}; statistics on ${socket}.stats\n`);
    },
  );

  test('that cannot have its statistics channel says so', async () => {
    const statistics = join(directory, 'taken');
    mkdirSync(statistics);
    const { code, stderr } = await run([
      'host',
      '--socket',
      join(directory, 'kvmi'),
      '--statistics',
      statistics,
    ]);
    expect(stderr).toContain(`the socket "${statistics}" is not a socket [INVALID_ARGUMENT]`);
    expect(stderr).toContain('what to do: ');
    expect(code).toBe(2);
  });

  test.each([
    ['in a directory that is not there', '/nowhere/kvmi', 'lies in /nowhere, which is not a directory'],
    ['that is a file', fileURLToPath(import.meta.url), 'is not a socket'],
    ['that is too long', `/tmp/${'x'.repeat(110)}`, 'is not a path of 1 to 107 bytes'],
  ])('with a socket %s says so, and does not wait for it', async (_what, socket, says) => {
    const statistics = join(directory, 'stats');
    const { code, stderr } = await run([
      'host',
      '--socket',
      socket,
      '--statistics',
      statistics,
      '--vcpus',
      '1',
    ]);
    expect(stderr).toContain(`${says} [INVALID_ARGUMENT]`);
    expect(code).toBe(2);
    expect(existsSync(statistics)).toBe(false);
  });

  test('a second one on the same paths leaves the first one its statistics channel', async () => {
    const socket = join(directory, 'kvmi');
    const args = ['host', '--socket', socket, '--vcpus', '1'];
    const first = start(args);
    await first.prints('waiting for a tool', 'stderr');
    const { code, stderr } = await run(args);
    expect(stderr).toContain(`another process listens on ${socket}.stats [INVALID_ARGUMENT]`);
    expect(code).toBe(2);
    const client = await StatisticsClient.connect(`${socket}.stats`);
    expect(await client.statistics()).toMatchObject({ vcpus: 1 });
    client.close();
  });
});

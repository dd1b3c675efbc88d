import { existsSync, mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
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
      expect(command.stderr).toContain(
        `1 vCPUs, seed 1, connects to ${socket}, statistics on ${socket}.stats`,
      );
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
    expect(stderr).toContain(`cannot listen on ${statistics} [INVALID_ARGUMENT]`);
    expect(stderr).toContain('what to do: ');
    expect(code).toBe(2);
  });
});

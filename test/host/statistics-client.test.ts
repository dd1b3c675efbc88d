import { mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { StatisticsClient } from '../../src/host/statistics-client.js';

/** A host that answers the first request with `answer` and ends. */
async function hostThatEndsAfter(answer: string): Promise<StatisticsClient> {
  const directory = mkdtempSync(join(tmpdir(), 'statistics-'));
  const path = join(directory, 'socket');
  const server = createServer((socket) => socket.once('data', () => socket.end(answer)));
  await new Promise<void>((resolve) => server.listen(path, resolve));
  onTestFinished(() => {
    server.close();
    rmSync(directory, { recursive: true });
  });
  return StatisticsClient.connect(path);
}

test.each(['', '{"uptimeMs":1', '{"uptimeMs":'])(
  'a host that is killed while it answers (%j) is told as gone, to all who wait and to the next',
  async (answer) => {
    const client = await hostThatEndsAfter(answer);
    const asked = [client.statistics(), client.image()];
    for (const each of asked) await expect(each).rejects.toMatchObject({ code: 'HYPERVISOR_GONE' });
    await expect(client.statistics()).rejects.toMatchObject({ code: 'HYPERVISOR_GONE' });
  },
);

import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import type { Introspection } from '../../src/host/introspection.js';
import { KvmiConnection } from '../../src/host/kvmi-connection.js';

const ATTEMPTS = 3;

/** The errors told of in several attempts to reach a tool at `path`. */
async function told(path: string): Promise<Error[]> {
  const errors: Error[] = [];
  let connection: KvmiConnection | undefined;
  await new Promise<void>((resolve) => {
    let attempts = 0;
    connection = new KvmiConnection({
      path,
      introspection: { attached: false } as Introspection,
      name: 'guest',
      uuid: Buffer.alloc(16),
      onActivity: () => ++attempts === ATTEMPTS && resolve(),
      onState: () => {},
      onUnreachable: (error) => errors.push(error),
      onFailure: () => {},
    });
  });
  connection?.close();
  return errors;
}

test('a tool that is not there yet is waited for in silence', async () => {
  expect(await told('/nowhere/kvmi')).toEqual([]);
});

test('a tool that cannot be reached is told of once, and tried again', async () => {
  const belowFile = `${fileURLToPath(import.meta.url)}/kvmi`;
  expect(await told(belowFile)).toEqual([expect.objectContaining({ code: 'ENOTDIR' })]);
});

import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { cutConnection } from '../../src/libvmi/cut.js';

test('cutting a connection that is not there does nothing', () => {
  expect(() => cutConnection(join(tmpdir(), 'memtables-no-such-socket'))).not.toThrow();
});

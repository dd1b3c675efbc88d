import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { MemtablesError } from '../../src/errors.js';
import { INIT_ERROR_VM_NOT_FOUND } from '../../src/libvmi/abi.js';
import { openSession } from '../../src/libvmi/open-session.js';
import { LIBRARIES } from './libraries.js';

/** The one name that the stub of libvirt does not know. The bundled library does not look names up. */
const NO_SUCH_DOMAIN = 'no-such-domain';

const real = LIBRARIES.find(({ library }) => library === 'libvmi itself');

test.skipIf(real === undefined)('libvmi itself says when there is no VM of that name', () => {
  const socket = join(tmpdir(), `memtables-${process.pid}.sock`);
  let thrown: unknown;
  try {
    openSession({ name: NO_SUCH_DOMAIN, socket, libraryPath: real!.path });
  } catch (error) {
    thrown = error;
  }
  expect(thrown).toBeInstanceOf(MemtablesError);
  expect(thrown).toMatchObject({ code: 'ATTACH_FAILED', context: { code: INIT_ERROR_VM_NOT_FOUND } });
});

import { rmSync } from 'node:fs';
import { resolve } from 'node:path';
import { MemtablesError } from '../errors.js';
import { isSocketAt, socketPathInvalid } from '../socket-place.js';
import { unixSocketsAt } from './unix-sockets.js';

/** libvmi's driver takes such a path for the number of a vsock port (C's `atoi` is above 0). */
const READS_AS_PORT = /^\s*\+?0*[1-9]/;

/**
 * Makes sure that a library can listen on `path`, and removes the socket that an earlier run left there.
 *
 * @throws MemtablesError `INVALID_ARGUMENT` when `path` cannot be a socket's, `ATTACH_FAILED` when another process
 * listens on it
 */
export function prepareSocketPath(path: string): void {
  if (READS_AS_PORT.test(path)) {
    throw socketPathInvalid(
      path,
      'starts with a number, which libvmi takes for a vsock port',
      `Write ./${path.trim()}`,
    );
  }
  // libkvmi would delete whatever else it finds there.
  const leftOver = isSocketAt(path);
  if (unixSocketsAt([resolve(path)]).some(({ listening }) => !listening)) {
    throw new MemtablesError('ATTACH_FAILED', `a tool is attached to the hypervisor on ${path}`, {
      remedy: 'End that tool first: a hypervisor takes one at a time.',
      context: { socket: path },
    });
  }
  if (!leftOver) return;
  if (isListenedOn(path)) {
    throw new MemtablesError('ATTACH_FAILED', `another process listens on ${path}`, {
      remedy:
        'End the other introspection tool, or choose another socket for both the hypervisor and this one.',
      context: { socket: path },
    });
  }
  removeSocket(path);
}

export function removeSocket(path: string): void {
  rmSync(path, { force: true });
}

function isListenedOn(path: string): boolean {
  return unixSocketsAt([path, resolve(path)]).some(({ listening }) => listening);
}

import { rmSync, type Stats, statSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { MemtablesError } from '../errors.js';
import { unixSocketsAt } from './unix-sockets.js';

/** What a unix socket's address holds, without the final zero; libkvmi cuts a longer path off silently. */
const MAX_PATH_BYTES = 107;

/** libvmi's driver takes such a path for the number of a vsock port (C's `atoi` is above 0). */
const READS_AS_PORT = /^\s*\+?0*[1-9]/;

/**
 * Makes sure that a library can listen on `path`, and removes the socket that an earlier run left there.
 *
 * @throws MemtablesError `INVALID_ARGUMENT` when `path` cannot be a socket's, `ATTACH_FAILED` when another process
 * listens on it
 */
export function prepareSocketPath(path: string): void {
  if (path === '' || path.includes('\0') || Buffer.byteLength(path) > MAX_PATH_BYTES) {
    throw invalid(path, `is not a path of 1 to ${MAX_PATH_BYTES} bytes`, 'Choose another path.');
  }
  if (READS_AS_PORT.test(path)) {
    throw invalid(
      path,
      'starts with a number, which libvmi takes for a vsock port',
      `Write ./${path.trim()}`,
    );
  }
  const directory = dirname(path);
  if (!stat(directory)?.isDirectory()) {
    throw invalid(path, `lies in ${directory}, which is not a directory`, 'Create the directory.');
  }
  if (unixSocketsAt([resolve(path)]).some(({ listening }) => !listening)) {
    throw new MemtablesError('ATTACH_FAILED', `a tool is attached to the hypervisor on ${path}`, {
      remedy: 'End that tool first: a hypervisor takes one at a time.',
      context: { socket: path },
    });
  }
  const existing = stat(path);
  if (existing === undefined) return;
  // libkvmi would delete whatever it finds here.
  if (!existing.isSocket()) throw invalid(path, 'is not a socket', 'Choose another path.');
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

function invalid(path: string, problem: string, remedy: string): MemtablesError {
  return new MemtablesError('INVALID_ARGUMENT', `the socket ${JSON.stringify(path)} ${problem}`, {
    remedy,
    context: { socket: path },
  });
}

function stat(path: string): Stats | undefined {
  try {
    return statSync(path);
  } catch {
    return undefined;
  }
}

function isListenedOn(path: string): boolean {
  return unixSocketsAt([path, resolve(path)]).some(({ listening }) => listening);
}

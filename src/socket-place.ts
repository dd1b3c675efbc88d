import { type Stats, statSync } from 'node:fs';
import { dirname } from 'node:path';
import { MemtablesError } from './errors.js';

/** What a unix socket's address holds, without the final zero; libkvmi cuts a longer path off silently. */
const MAX_PATH_BYTES = 107;

/**
 * Checks that a unix socket is at `path`, or can come to be there.
 *
 * @returns whether one is there
 * @throws MemtablesError `INVALID_ARGUMENT` when its directory is missing, or something else has the name
 */
export function isSocketAt(path: string): boolean {
  if (path === '' || path.includes('\0') || Buffer.byteLength(path) > MAX_PATH_BYTES) {
    throw socketPathInvalid(path, `is not a path of 1 to ${MAX_PATH_BYTES} bytes`, 'Choose another path.');
  }
  const directory = dirname(path);
  if (!stat(directory)?.isDirectory()) {
    throw socketPathInvalid(path, `lies in ${directory}, which is not a directory`, 'Create the directory.');
  }
  const there = stat(path);
  if (there !== undefined && !there.isSocket()) {
    throw socketPathInvalid(path, 'is not a socket', 'Choose another path.');
  }
  return there !== undefined;
}

export function socketPathInvalid(path: string, problem: string, remedy: string): MemtablesError {
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

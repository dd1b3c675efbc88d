import { type Stats, statSync } from 'node:fs';
import { connect } from 'node:net';
import { dirname } from 'node:path';
import { MemtablesError } from '../errors.js';

/** What a unix socket's address holds, without the final zero. */
const MAX_PATH_BYTES = 107;

/**
 * Checks that a unix socket is at `path`, or can come to be there.
 *
 * @returns whether one is there
 * @throws MemtablesError `INVALID_ARGUMENT` when its directory is missing, or something else has the name
 */
export function isSocketAt(path: string): boolean {
  if (path === '' || path.includes('\0') || Buffer.byteLength(path) > MAX_PATH_BYTES) {
    throw invalid(path, `is not a path of 1 to ${MAX_PATH_BYTES} bytes`, 'Choose another path.');
  }
  const directory = dirname(path);
  if (!stat(directory)?.isDirectory()) {
    throw invalid(path, `lies in ${directory}, which is not a directory`, 'Create the directory.');
  }
  const there = stat(path);
  if (there !== undefined && !there.isSocket()) {
    throw invalid(path, 'is not a socket', 'Choose another path.');
  }
  return there !== undefined;
}

/** Whether a process listens on the socket, as far as can be told: one that cannot be asked counts as one. */
export function isListenedOn(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = connect(path);
    const answer = (listening: boolean) => {
      probe.destroy();
      resolve(listening);
    };
    probe.once('connect', () => answer(true));
    probe.once('error', ({ code }: NodeJS.ErrnoException) =>
      answer(code !== 'ECONNREFUSED' && code !== 'ENOENT'),
    );
  });
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

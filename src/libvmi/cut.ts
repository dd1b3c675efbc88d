import { readdirSync, readlinkSync } from 'node:fs';
import koffi from 'koffi';
import { unixSocketsAt } from './unix-sockets.js';

/** Shut down for reading and writing, in C. */
const SHUT_RDWR = 2;

const DESCRIPTORS = '/proc/self/fd';

let shutdown: ((descriptor: number, how: number) => number) | undefined;

/**
 * Cuts the connections that this process has accepted on the unix socket `path`. May be called from any thread: the
 * call that another one is blocked in fails then, and so does every later one. The hypervisor sees that the tool is
 * gone, lifts every restriction and lets the guest run.
 *
 * libvmi has no call for it, and waits long (or for ever) for a hypervisor that has stopped answering.
 */
export function cutConnection(path: string): void {
  const accepted = new Set(
    unixSocketsAt([path])
      .filter(({ listening }) => !listening)
      .map(({ inode }) => `socket:[${inode}]`),
  );
  if (accepted.size === 0) return;
  shutdown ??= koffi.load(null).func('shutdown', 'int', ['int', 'int']);
  for (const descriptor of readdirSync(DESCRIPTORS)) {
    if (accepted.has(target(descriptor))) shutdown(Number(descriptor), SHUT_RDWR);
  }
}

function target(descriptor: string): string {
  try {
    return readlinkSync(`${DESCRIPTORS}/${descriptor}`);
  } catch {
    // Closed meanwhile.
    return '';
  }
}

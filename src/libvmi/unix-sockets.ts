import { readFileSync } from 'node:fs';

/** A unix socket with a path, as this machine's kernel lists it. */
export interface UnixSocket {
  readonly inode: string;
  /** As it was bound; one that was accepted has the path of the one that listened. */
  readonly path: string;
  readonly listening: boolean;
}

/** In the flags of `/proc/net/unix`: somebody listens on it. */
const ACCEPTS_CONNECTIONS = 0x10000;

/** The sockets that were bound to one of `paths`, or accepted on it. */
export function unixSocketsAt(paths: readonly string[]): UnixSocket[] {
  return readFileSync('/proc/net/unix', 'utf8')
    .split('\n')
    .map((line) => {
      // Num: RefCount Protocol Flags Type St Inode Path
      const [, , , flags = '0', , , inode = '', ...name] = line.trim().split(/\s+/);
      const listening = (Number.parseInt(flags, 16) & ACCEPTS_CONNECTIONS) !== 0;
      return { inode, path: name.join(' '), listening };
    })
    .filter(({ path }) => paths.includes(path));
}

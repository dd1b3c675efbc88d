import { spawnSync } from 'node:child_process';
import { basename, join } from 'node:path';
import { MemtablesError } from '../errors.js';

const LIBRARY_FOLDERS = ['lib/x86_64-linux-gnu', 'usr/lib/x86_64-linux-gnu'];
const LOADER = 'lib64/ld-linux-x86-64.so.2';

/** A folder with unpacked Debian packages, whose programs run from there, on their own C library. */
export class DebianRoot {
  constructor(readonly folder: string) {}

  path(...parts: readonly string[]): string {
    return join(this.folder, ...parts);
  }

  get libraryFolders(): string[] {
    return LIBRARY_FOLDERS.map((folder) => this.path(folder));
  }

  /** How a program of these packages is started: a command and its first arguments. */
  command(program: string): [string, ...string[]] {
    return [this.path(LOADER), '--library-path', this.libraryFolders.join(':'), program];
  }

  /** Runs a program of these packages to its end; returns what it has written. */
  run(program: string, args: readonly string[]): Buffer {
    const [command, ...first] = this.command(this.path(program));
    const { status, error, stdout, stderr } = spawnSync(command, [...first, ...args], {
      stdio: ['ignore', 'pipe', 'pipe'],
      maxBuffer: 2 ** 28,
    });
    if (status === 0) return stdout;
    throw new MemtablesError(
      'SETUP_INCOMPLETE',
      `${program} failed: ${error?.message ?? stderr.toString()}`,
      {
        remedy: `Remove ${this.folder} and try again; if it fails again, report it.`,
      },
    );
  }

  /**
   * The shared libraries that a program or library needs, by their names, and the loader.
   *
   * @throws MemtablesError `SETUP_INCOMPLETE` when it cannot run on these
   */
  librariesOf(file: string): Map<string, string> {
    const [loader, ...options] = this.command(file);
    const { status, stdout, stderr } = spawnSync(loader, ['--list', ...options], { encoding: 'utf8' });
    const found = new Map([[basename(LOADER), this.path(LOADER)]]);
    for (const [, name, path] of stdout.matchAll(/^\s*([^\s/]+) => (\S+) \(/gm)) found.set(name!, path!);
    if (status === 0 && !stdout.includes('not found')) return found;
    throw new MemtablesError(
      'SETUP_INCOMPLETE',
      `${file} does not run on Debian 12's libraries: ${stderr}${stdout}`,
      {
        remedy: 'Use a Node from nodejs.org, and native parts built on a machine that is no newer.',
      },
    );
  }
}

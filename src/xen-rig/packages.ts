import { spawnSync } from 'node:child_process';
import { mkdirSync, readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { MemtablesError } from '../errors.js';

/** What the rig is made of; apt adds what they depend on. Their versions are those of Debian 12. */
export const PACKAGES = [
  // The machine. The terminal stands for a graphical display, which nobody needs.
  'bochs',
  'bochs-term',
  // setpriv, by which it ends when we do.
  'util-linux',
  // The hypervisor, its tools, and the headers that native/xen is built with.
  'xen-hypervisor-4.17-amd64',
  'xen-utils-4.17',
  'libxen-dev',
  // The cloud kernel cannot be dom0.
  'linux-image-amd64',
  'busybox-static',
  // What makes the image to boot from.
  'grub-common',
  'grub-pc-bin',
  'xorriso',
  'xz-utils',
] as const;

/** Root, where it is, would only be given up for a user who may not write here. */
const AS_ANY_USER = ['-o', 'APT::Sandbox::User=root', '-o', 'Debug::NoLocking=1'];

/**
 * Downloads the packages and unpacks them to `root`: nothing is installed, nothing of the machine's own package lists is
 * changed, and apt checks what it downloads, so that any user may.
 *
 * @param work a folder for what is needed meanwhile
 * @throws MemtablesError `SETUP_INCOMPLETE`
 */
export function unpackPackages(root: string, work: string): void {
  const archives = join(work, 'archives');
  const lists = join(work, 'lists');
  for (const folder of [root, work]) rmSync(folder, { recursive: true, force: true });
  for (const folder of [root, join(archives, 'partial'), join(lists, 'partial')]) {
    mkdirSync(folder, { recursive: true });
  }
  const options = [
    ...AS_ANY_USER,
    ...['-o', `Dir::State=${work}`, '-o', `Dir::State::lists=${lists}`],
    ...['-o', `Dir::Cache=${work}`, '-o', `Dir::Cache::archives=${archives}`],
    // As if nothing were installed: the packages must not lean on this machine's.
    ...['-o', 'Dir::State::status=/dev/null', '-o', 'Acquire::Languages=none'],
  ];
  run(
    'apt-get',
    [...options, '-qq', 'update'],
    'check that the Debian mirror can be reached (apt-get update)',
  );
  run(
    'apt-get',
    [...options, '-qq', '-y', '--no-install-recommends', '--download-only', 'install', ...PACKAGES],
    "the rig is made of Debian 12's packages: apt's sources have to name Debian 12 (bookworm) with its updates",
  );
  for (const file of readdirSync(archives).filter((name) => name.endsWith('.deb'))) {
    run('dpkg-deb', ['-x', join(archives, file), root], 'see what it printed above');
  }
  rmSync(work, { recursive: true });
}

function run(command: string, args: readonly string[], remedy: string): void {
  const { status, error, stderr } = spawnSync(command, args, {
    stdio: ['ignore', 'ignore', 'pipe'],
    encoding: 'utf8',
  });
  if (status === 0) return;
  const isMissing = (error as NodeJS.ErrnoException | undefined)?.code === 'ENOENT';
  throw new MemtablesError('SETUP_INCOMPLETE', `${command} failed: ${error?.message ?? stderr.trim()}`, {
    remedy: isMissing ? 'run it on a Debian 12, or in a container of one' : remedy,
  });
}

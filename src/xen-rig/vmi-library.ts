import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, realpathSync } from 'node:fs';
import { join } from 'node:path';
import { MemtablesError } from '../errors.js';
import type { DebianRoot } from './debian-root.js';
import type { Steps } from './steps.js';

/** The library that dom0 attaches through. */
export interface VmiLibrary {
  /** As `native-xen` or `libvmi-0.15.0`. */
  readonly name: string;
  readonly path: string;
}

/** A libvmi that was installed to `prefix`, with its Xen driver. */
export function installedLibvmi(prefix: string): VmiLibrary {
  const library = join(prefix, 'lib/libvmi.so.0');
  const description = join(prefix, 'lib/pkgconfig/libvmi.pc');
  const missing = [library, description].find((path) => !existsSync(path));
  if (missing !== undefined) {
    throw new MemtablesError('INVALID_ARGUMENT', `there is no ${missing}`, {
      remedy: 'Name the prefix that libvmi was installed to.',
    });
  }
  const version = /^Version: (.+)$/m.exec(readFileSync(description, 'utf8'))?.[1] ?? 'unknown';
  return { name: `libvmi-${version}`, path: realpathSync(library) };
}

/** Our own, built against the Xen of the rig. */
export function nativeXen(steps: Steps, cache: string, debian: DebianRoot, projectRoot: string): VmiLibrary {
  const path = join(cache, 'xen.so');
  steps.ensure({
    name: 'library',
    what: 'building the library for Xen',
    inputs: ['native/xen', 'native/vmi', 'scripts/build-xen.mjs'].map((input) => join(projectRoot, input)),
    salt: '',
    outputs: [path],
    run: () => {
      const args = ['scripts/build-xen.mjs', debian.folder, path];
      const { status } = spawnSync(process.execPath, args, { cwd: projectRoot, stdio: ['ignore', 2, 2] });
      if (status === 0) return;
      throw new MemtablesError('SETUP_INCOMPLETE', 'the library for Xen could not be built', {
        remedy: 'See what the compiler printed above.',
      });
    },
  });
  return { name: 'native-xen', path };
}

import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { basename, dirname, join } from 'node:path';
import type { DebianRoot } from './debian-root.js';
import { DOM0_INIT, MODULES, PROJECT_IN_DOM0, VMI_LIBRARY_FOLDER } from './dom0-init.js';

/** Where the job for dom0 lies in the tree, beside the project. */
export const JOB_IN_DOM0 = join(PROJECT_IN_DOM0, 'job.json');
const LIBRARIES_IN_DOM0 = 'lib/x86_64-linux-gnu';
const XEN_BIN = 'usr/lib/xen-4.17/bin';
const XEN_PROGRAMS = ['xl', 'xenstored', 'xenconsoled', 'xen-init-dom0'];
const APPLETS = ['cat', 'insmod', 'ln', 'mkdir', 'mount', 'poweroff', 'sh', 'sleep', 'stty'];
/** Loaded at run time only, by libvmi and by us, or by the C library when a thread is cancelled. */
const ALSO_NEEDED = ['libxenctrl', 'libxenstore', 'libxenforeignmemory', 'libxenevtchn', 'libgcc_s'];

export interface Dom0Contents {
  /** The project's own files and folders, relative to its root. */
  readonly project: readonly string[];
  /** The library with libvmi's C ABI. */
  readonly library: string;
}

/** Makes dom0's file system in `tree`: Xen's tools, the project, and what Node needs. Node itself is on the CD. */
export function makeDom0Tree(
  tree: string,
  debian: DebianRoot,
  projectRoot: string,
  contents: Dom0Contents,
): void {
  rmSync(tree, { recursive: true, force: true });
  for (const folder of [
    'bin',
    'cd',
    'dev',
    'etc/xen',
    'lib64',
    'mod',
    'proc',
    'root',
    'run',
    'sys',
    'tmp',
    'var/lib/xen',
    'var/log/xen',
    'var/lib/xenstored',
    'usr/lib',
    LIBRARIES_IN_DOM0,
  ]) {
    mkdirSync(join(tree, folder), { recursive: true });
  }
  symlinkSync('/run', join(tree, 'var/run'));
  symlinkSync(`/${LIBRARIES_IN_DOM0}`, join(tree, 'usr', LIBRARIES_IN_DOM0));
  writeFileSync(join(tree, 'etc/xen/xl.conf'), '');
  writeFileSync(join(tree, 'init'), DOM0_INIT);
  chmodSync(join(tree, 'init'), 0o755);

  cpSync(debian.path('bin/busybox'), join(tree, 'bin/busybox'));
  for (const applet of APPLETS) symlinkSync('busybox', join(tree, 'bin', applet));
  const libraries = new Map<string, string>();
  const add = (file: string, target: string) => {
    for (const [name, path] of debian.librariesOf(file)) libraries.set(name, path);
    mkdirSync(dirname(join(tree, target)), { recursive: true });
    cpSync(file, join(tree, target), { dereference: true });
  };
  for (const program of XEN_PROGRAMS) {
    // Where they look for each other.
    add(debian.path(XEN_BIN, program), join(XEN_BIN, program));
    symlinkSync(`/${XEN_BIN}/${program}`, join(tree, 'bin', program));
  }
  for (const [name, path] of debian.librariesOf(process.execPath)) libraries.set(name, path);
  add(contents.library, join(VMI_LIBRARY_FOLDER, basename(contents.library)));
  for (const folder of debian.libraryFolders) {
    for (const name of existsSync(folder) ? readdirSync(folder) : []) {
      if (ALSO_NEEDED.some((needed) => name.startsWith(`${needed}.so`)))
        libraries.set(name, join(folder, name));
    }
  }
  for (const [name, path] of libraries) {
    const folder = name.startsWith('ld-linux') ? 'lib64' : LIBRARIES_IN_DOM0;
    cpSync(path, join(tree, folder, name), { dereference: true });
  }
  const modules = debian.path('lib/modules');
  for (const module of MODULES) {
    const [kernel] = readdirSync(modules);
    cpSync(join(modules, kernel!, 'kernel', module), join(tree, 'mod', basename(module)));
  }
  for (const path of contents.project) {
    cpSync(join(projectRoot, path), join(tree, PROJECT_IN_DOM0, path), {
      recursive: true,
      dereference: true,
    });
  }
}

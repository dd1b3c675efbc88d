import { copyFileSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { gunzipSync } from 'node:zlib';
import { cpioOf } from './cpio.js';
import type { DebianRoot } from './debian-root.js';
import { compressedKernelIn, loadableOnly } from './dom0-kernel.js';
import { JOB_IN_DOM0, makeDom0Tree } from './dom0-tree.js';
import { makeIso } from './iso.js';
import type { Dom0Job } from './report.js';
import type { Steps } from './steps.js';

/** What the program in dom0 needs of the project. */
const PROJECT = [
  'package.json',
  'dist',
  'build/guest',
  'build/Release/abi-check',
  'node_modules/koffi',
  'node_modules/@koromix/koffi-linux-x64',
  'node_modules/iced-x86',
];

/** Makes the CD for a job in `folder`, unless it is there; returns its path. */
export function ensureCd(
  steps: Steps,
  folder: string,
  debian: DebianRoot,
  projectRoot: string,
  library: string,
  job: Dom0Job,
): string {
  const files = {
    xen: join(folder, 'xen'),
    vmlinux: join(folder, 'vmlinux'),
    initrd: join(folder, 'initrd'),
  };
  const node = join(folder, 'node');
  const iso = join(folder, 'rig.iso');
  steps.ensure({
    name: 'kernels',
    what: 'unpacking Xen and the kernel of dom0',
    inputs: [debian.path('boot')],
    salt: '',
    outputs: [files.xen, files.vmlinux],
    run: () => unpackKernels(debian, files),
  });
  steps.ensure({
    name: 'cd',
    what: 'making the CD with dom0 (145 MB)',
    inputs: [
      ...PROJECT.map((path) => join(projectRoot, path)),
      library,
      files.xen,
      files.vmlinux,
      process.execPath,
    ],
    salt: JSON.stringify(job),
    outputs: [iso],
    run: () => {
      const tree = join(folder, 'dom0');
      makeDom0Tree(tree, debian, projectRoot, { project: PROJECT, library });
      writeFileSync(join(tree, JOB_IN_DOM0), JSON.stringify(job));
      writeFileSync(files.initrd, cpioOf(tree));
      copyFileSync(process.execPath, node);
      makeIso(iso, debian, { ...files, node }, join(folder, 'cd'));
      for (const path of [tree, files.initrd, node]) rmSync(path, { recursive: true });
    },
  });
  return iso;
}

function unpackKernels(debian: DebianRoot, files: { readonly xen: string; readonly vmlinux: string }): void {
  const boot = (pattern: RegExp) => {
    const name = readdirSync(debian.path('boot')).find((file) => pattern.test(file));
    return readFileSync(debian.path('boot', name!));
  };
  writeFileSync(files.xen, gunzipSync(boot(/^xen-.*\.gz$/)));
  const compressed = `${files.vmlinux}.xz`;
  writeFileSync(compressed, compressedKernelIn(boot(/^vmlinuz-/)));
  writeFileSync(
    files.vmlinux,
    loadableOnly(debian.run('usr/bin/xz', ['-dc', '--single-stream', compressed])),
  );
  rmSync(compressed);
}

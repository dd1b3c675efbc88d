import { copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { DebianRoot } from './debian-root.js';

const GRUB = 'usr/lib/grub/i386-pc';
const GRUB_MODULES = 'biosdisk iso9660 normal multiboot2 serial terminal echo configfile'.split(' ');

const XEN_OPTIONS = [
  'console=com1 com1=115200,8n1 loglvl=warning guest_loglvl=all',
  'dom0_mem=448M,max:448M dom0_max_vcpus=1 hap=1 sched=credit2',
  'noreboot iommu=0 spec-ctrl=no xpti=0 xsave=0',
].join(' ');

const LINUX_OPTIONS = [
  'console=hvc0 loglevel=7 mitigations=off init_on_alloc=0 cryptomgr.notests',
  'audit=0 nokaslr lpj=200000 rodata=off print-fatal-signals=1',
].join(' ');

const MENU = `set timeout=0
serial --unit=0 --speed=115200
terminal_output serial
echo loading xen
multiboot2 /xen placeholder ${XEN_OPTIONS}
module2 /vmlinux placeholder ${LINUX_OPTIONS}
echo loading dom0
module2 --nounzip /initrd
boot
`;

/** What is on the CD. */
export interface BootFiles {
  readonly xen: string;
  readonly vmlinux: string;
  readonly initrd: string;
  /** Read from there when it runs: most of it is never needed, and GRUB is slow. */
  readonly node: string;
}

/** Writes a CD to `iso` that a PC boots: GRUB, then Xen with dom0. */
export function makeIso(iso: string, debian: DebianRoot, files: BootFiles, work: string): void {
  rmSync(work, { recursive: true, force: true });
  mkdirSync(join(work, 'boot/grub'), { recursive: true });
  writeFileSync(join(work, 'boot/grub/grub.cfg'), MENU);
  for (const [name, path] of Object.entries(files)) copyFileSync(path, join(work, name));
  const core = join(work, 'boot/grub/core.img');
  const grub = debian.path(GRUB);
  debian.run('usr/bin/grub-mkimage', [
    ...['-d', grub, '-O', 'i386-pc', '-p', '/boot/grub', '-o', core],
    ...GRUB_MODULES,
  ]);
  const loader = 'boot/grub/loader.img';
  writeFileSync(
    join(work, loader),
    Buffer.concat([join(grub, 'cdboot.img'), core].map((path) => readFileSync(path))),
  );
  debian.run('usr/bin/xorriso', [
    ...['-as', 'mkisofs', '-quiet', '-R', '-b', loader],
    ...['-no-emul-boot', '-boot-load-size', '4', '-boot-info-table'],
    ...['-o', iso, work],
  ]);
  rmSync(work, { recursive: true });
}

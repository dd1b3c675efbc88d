/** Where the project lies in dom0. */
export const PROJECT_IN_DOM0 = '/memtables';
/** The folder of the library with libvmi's C ABI. */
export const VMI_LIBRARY_FOLDER = '/usr/lib/memtables';
/** Where the program in dom0 says what it has to say: on a line of its own, on which nobody else writes. */
export const RESULTS_TTY = '/dev/ttyS1';
/** Begins the lines that tell on the console how far the boot has come. */
export const STAGE_MARK = '### ';

/** Kernel modules, in the order in which they are loaded: each behind those it needs; xenfs needs xen-privcmd. */
export const MODULES = [
  'drivers/scsi/scsi_common.ko',
  'drivers/scsi/scsi_mod.ko',
  'drivers/ata/libata.ko',
  'drivers/ata/ata_piix.ko',
  'drivers/cdrom/cdrom.ko',
  'drivers/scsi/sr_mod.ko',
  'fs/isofs/isofs.ko',
  'drivers/xen/xen-privcmd.ko',
  'drivers/xen/xenfs/xenfs.ko',
  'drivers/xen/xen-evtchn.ko',
  'drivers/xen/xen-gntdev.ko',
  'drivers/xen/xen-gntalloc.ko',
];

const INSMOD = MODULES.map((module) => `insmod /mod/${module.split('/').at(-1)}`).join('\n');

/** dom0's first process. It switches the machine off, whatever happens. */
export const DOM0_INIT = `#!/bin/sh
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
mkdir -p /run/lock /run/xen /run/xenstored
ln -s /run/lock /var/lock
say() { echo "${STAGE_MARK}$*"; }
say init
${INSMOD}
mount -t xenfs xen /proc/xen
xenstored --pid-file /run/xenstored.pid
say xenstored
xen-init-dom0
# Without it a domain is never created.
xenconsoled --pid-file=/run/xenconsoled.pid
stty -F ${RESULTS_TTY} 115200 raw -echo
until mount -r -t iso9660 /dev/sr0 /cd 2> /dev/null; do sleep 0.1; done
say node
/cd/node --wasm-lazy-compilation ${PROJECT_IN_DOM0}/dist/xen-rig/in-dom0.js "$(cat ${PROJECT_IN_DOM0}/job.json)" > ${RESULTS_TTY}
say "node ended with $?"
poweroff -f
`;

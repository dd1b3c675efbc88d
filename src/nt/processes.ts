import { type Gva, hex } from '../vmi/address.js';
import type { Kernel } from './kernel.js';
import { walkList } from './list.js';
import { kernelPointer, Layout } from './structure.js';

/** Far more than a Windows guest can hold; a longer list is hostile. */
const MAX_PROCESSES = 0x1_0000;
/** UCHAR ImageFileName[15]; not terminated when it fills the field. */
const IMAGE_NAME_LENGTH = 15;

export interface Process {
  /** Its EPROCESS. */
  readonly gva: Gva;
  readonly pid: bigint;
  /** The file name of its image, cut off by the kernel after 15 bytes. */
  readonly name: string;
}

/**
 * Every process in the list of active ones. The idle process is not in it.
 *
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID`, `GUEST_MEMORY_UNMAPPED` when the list does not add up
 */
export function* processes(kernel: Kernel): Generator<Process> {
  const links = BigInt(kernel.profile.offset('_EPROCESS', 'ActiveProcessLinks'));
  const head = kernel.symbol('PsActiveProcessHead');
  for (const entry of walkList(kernel.memory, head, MAX_PROCESSES, 'processes')) {
    yield readProcess(kernel, entry - links);
  }
}

/** The process whose EPROCESS is at `gva`. @throws as `processes` does */
export function readProcess(kernel: Kernel, gva: Gva): Process {
  kernelPointer(gva, 'an EPROCESS');
  const fields = new Layout(kernel.profile, '_EPROCESS', {
    UniqueProcessId: 8,
    ImageFileName: IMAGE_NAME_LENGTH,
  }).read(kernel.memory, gva);
  return {
    gva,
    pid: fields.u64('UniqueProcessId'),
    name: printable(fields.bytesOf('ImageFileName', IMAGE_NAME_LENGTH)),
  };
}

export function describeProcess(process: Process): string {
  return `${process.name || hex(process.gva)} (${process.pid})`;
}

function printable(name: Buffer): string {
  const end = name.indexOf(0);
  return name
    .subarray(0, end < 0 ? name.length : end)
    .toString('latin1')
    .replace(/[^\x20-\x7e]/g, '?');
}

import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { MemtablesError } from '../errors.js';

/** dom0 has 256. */
const GUEST_WEIGHT = 16;

export interface DomainOptions {
  readonly name: string;
  /** An ELF file with a PVH entry. */
  readonly kernel: Buffer;
  readonly vcpus: number;
  readonly memoryMB: number;
}

/** Creates a Xen domain, and returns its number. Its files are kept in `folder`. */
export function createDomain({ name, kernel, vcpus, memoryMB }: DomainOptions, folder: string): number {
  const kernelPath = join(folder, `${name}.elf`);
  const configuration = join(folder, `${name}.cfg`);
  writeFileSync(kernelPath, kernel);
  writeFileSync(
    configuration,
    [
      `name="${name}"`,
      'type="pvh"',
      `kernel="${kernelPath}"`,
      `memory=${memoryMB}`,
      `vcpus=${vcpus}`,
      // Beside a guest that never idles, dom0 would only have half of the one processor.
      `cpu_weight=${GUEST_WEIGHT}`,
      // What went wrong can then still be looked at.
      'on_crash="preserve"',
      'on_reboot="preserve"',
      '',
    ].join('\n'),
  );
  xl('create', configuration);
  return Number(xl('domid', name));
}

/** Ends a domain at once. */
export function destroyDomain(name: string): void {
  xl('destroy', name);
}

function xl(...args: readonly string[]): string {
  const { status, error, stdout, stderr } = spawnSync('xl', args, { encoding: 'utf8' });
  if (status === 0) return stdout.trim();
  throw new MemtablesError('HYPERVISOR_FAILED', `xl ${args[0]} failed: ${error?.message ?? stderr.trim()}`, {
    remedy: "Look at the rig's console log for what Xen says.",
  });
}

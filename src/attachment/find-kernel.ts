import { setTimeout as sleep } from 'node:timers/promises';
import { MemtablesError } from '../errors.js';
import { discoverKernel, type Kernel } from '../nt/kernel.js';
import type { Profile } from '../nt/profile.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { whileQuiescent } from '../vmi/quiescence.js';

/** A vCPU in user mode may hide the kernel's mapping (KPTI): look again a little later, this often. */
const DISCOVERY_ATTEMPTS = 50;
const DISCOVERY_PAUSE_MS = 20;

/**
 * Finds the kernel of a guest that runs, after a while if need be.
 *
 * @throws MemtablesError as `discoverKernel`
 */
export async function findKernel(session: Hypervisor, profile: Profile): Promise<Kernel> {
  for (let attempt = 1; ; attempt++) {
    try {
      return whileQuiescent(session, () => discoverKernel(session, profile));
    } catch (error) {
      const hidden = error instanceof MemtablesError && error.code === 'KERNEL_NOT_FOUND';
      if (!hidden || attempt === DISCOVERY_ATTEMPTS) throw error;
    }
    session.listen(0);
    await sleep(DISCOVERY_PAUSE_MS);
  }
}

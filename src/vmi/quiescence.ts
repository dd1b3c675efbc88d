import { MemtablesError } from '../errors.js';
import type { Hypervisor } from './hypervisor.js';

/** A guest under constant violations settles in a handful of rounds; each round answers one a vCPU. */
const MAX_ROUNDS = 1000;

/**
 * Runs `work` with every vCPU paused and no event outstanding, and resumes whatever happens.
 *
 * A pause alone is not a barrier: a vCPU inside the hypervisor's emulator may still raise its event
 * afterwards, and then complete the instruction that it decoded before. Registers are served on the vCPU's
 * own thread, so a whole round of register reads without an event means that none is under way.
 *
 * @throws MemtablesError `NOT_QUIESCENT` when events keep coming.
 */
export function whileQuiescent<T>(hypervisor: Hypervisor, work: () => T): T {
  hypervisor.pause();
  try {
    settle(hypervisor);
    hypervisor.flushCaches();
    return work();
  } finally {
    try {
      // What `work` has written is in no cache.
      hypervisor.flushCaches();
    } finally {
      hypervisor.resume();
    }
  }
}

function settle(hypervisor: Hypervisor): void {
  for (let round = 0; round < MAX_ROUNDS; round++) {
    for (let vcpu = 0; vcpu < hypervisor.vcpuCount; vcpu++) hypervisor.registers(vcpu);
    if (hypervisor.listen(0) === 0) return;
  }
  throw new MemtablesError(
    'NOT_QUIESCENT',
    `the paused guest still raised events after ${MAX_ROUNDS} rounds`,
    {
      remedy: 'Check that the hypervisor stops a paused vCPU before its next instruction.',
      context: { rounds: MAX_ROUNDS },
    },
  );
}

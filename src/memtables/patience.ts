import type { Hypervisor } from '../vmi/hypervisor.js';

/** Answers the guest's violations for about this long. */
export function letGuestRun(hypervisor: Hypervisor, milliseconds: number): void {
  const end = performance.now() + milliseconds;
  for (let left = milliseconds; left > 0; left = end - performance.now()) {
    hypervisor.listen(Math.ceil(left));
  }
}

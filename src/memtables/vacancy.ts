import type { Kernel } from '../nt/kernel.js';
import type { LiveRange } from '../safety/ranges.js';
import type { Gva } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { type Obstacles, occupantsOf } from './obstacles.js';

/**
 * Knows whether something stands inside of code that is to be replaced. All threads are looked at once, when it is
 * first asked, however many places it is asked about: for as long as the guest stays quiescent nothing moves.
 */
export class Vacancy {
  #occupants: Obstacles | undefined;

  /** @param spans all places that it may be asked about */
  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly kernel: Kernel,
    private readonly spans: readonly LiveRange[],
  ) {}

  /**
   * Whether several instructions at `gva` can be replaced now. A vCPU must not stand at the first one either: should it
   * be about to complete that, it would go on in the middle of the new code.
   */
  isVacant(gva: Gva, length: number): boolean {
    const end = gva + BigInt(length);
    if (!this.spans.some((span) => span.start <= gva && end <= span.end)) return false;
    this.#occupants ??= occupantsOf(this.hypervisor, this.kernel, this.spans);
    const { findings, unsettled } = this.#occupants;
    // Not by their range: spans may overlap.
    const inside = findings.some(
      ({ kind, value }) => value < end && (kind === 'vcpu-rip' ? value >= gva : value > gva),
    );
    return !inside && unsettled.length === 0;
  }
}

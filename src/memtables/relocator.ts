import { MemtablesError } from '../errors.js';
import { planSeedHandler, seedHandlerSize } from '../handlers/seed.js';
import type { Kernel } from '../nt/kernel.js';
import type { SlackAllocator, SlackBlock } from '../slack/allocator.js';
import { holdsStableCode } from '../slack/regions.js';
import { proveTable, type TableProof } from '../switches/prove.js';
import { type Gva, hex } from '../vmi/address.js';
import type { Redirections } from './redirections.js';
import type { EngineEvent } from './report.js';
import type { Site } from './sites.js';

type Outcome = Extract<EngineEvent, { type: 'relocated' | 'refused' }>;

/** Replaces a hot table load by a jump to a handler that loads immediates. */
export class Relocator {
  constructor(
    private readonly kernel: Kernel,
    private readonly slack: SlackAllocator,
    private readonly redirections: Redirections,
    private readonly readOriginal: (gva: Gva, length: number) => Uint8Array,
  ) {}

  /**
   * Relocates `site`, or marks it as ignored with the reason. For a quiescent guest.
   *
   * @throws MemtablesError of the hypervisor or the journal; the guest is as before then
   */
  relocate(site: Site): Outcome {
    const proof = this.#prove(site);
    if ('refused' in proof) return this.#ignore(site, proof.refused);

    const slack = this.#allocate(seedHandlerSize(proof.entries.length));
    if (slack === undefined) return this.#ignore(site, 'no-slack');
    let installed = false;
    try {
      const plan = planSeedHandler({ ...proof.load, gva: site.rip }, proof.entries, slack.gva);
      if (plan.refused !== undefined) return this.#ignore(site, plan.refused);
      const label = `${proof.form} load at ${hex(site.rip)}`;
      site.redirection = this.redirections.install(
        'relocation',
        label,
        { code: plan.handler, jump: plan.site },
        slack,
      );
      installed = true;
    } finally {
      if (!installed) this.slack.free(slack);
    }
    site.state = 'relocated';
    return {
      type: 'relocated',
      site: site.rip,
      table: site.table,
      form: proof.form,
      entries: proof.entries.length,
      handler: slack.gva,
      handlerBytes: slack.size,
      hits: site.hits,
    };
  }
}

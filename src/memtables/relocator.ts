import { MemtablesError } from '../errors.js';
import type { HandlerPlan } from '../handlers/plan.js';
import {
  affordable,
  type Candidate,
  type HandlerChoice,
  type HandlerPlanning,
  passedOver,
  planHandlers,
} from '../handlers/planner.js';
import type { Kernel } from '../nt/kernel.js';
import type { FunctionTable } from '../nt/pdata.js';
import type { SlackAllocator, SlackBlock } from '../slack/allocator.js';
import { instabilityOf } from '../slack/regions.js';
import { functionAt } from '../switches/functions.js';
import { type FoundSwitch, SwitchRecogniser } from '../switches/table.js';
import { type Gva, hex } from '../vmi/address.js';
import type { Redirections } from './redirections.js';
import type { EngineEvent } from './report.js';
import type { Site } from './sites.js';

type Outcome = Extract<EngineEvent, { type: 'relocated' | 'refused' }>;

const ENTRY_BYTES = 4;
/** Trapped vCPUs stand still while a load is proven: no function of a kernel is larger. */
const MOST_FUNCTION_BYTES = 64 * 1024;

interface Placed {
  readonly candidate: Candidate;
  readonly plan: HandlerPlan;
  readonly slack: SlackBlock;
}

interface Prepared {
  readonly proof: FoundSwitch;
  readonly plans: readonly HandlerPlanning[];
}

/** Replaces a hot table load by a jump to a handler that loads immediates. */
export class Relocator {
  readonly #recogniser: SwitchRecogniser;

  constructor(
    private readonly kernel: Kernel,
    private readonly functions: FunctionTable,
    private readonly slack: SlackAllocator,
    private readonly redirections: Redirections,
    private readonly readOriginal: (gva: Gva, length: number) => Uint8Array | undefined,
    private readonly handler: HandlerChoice,
  ) {
    this.#recogniser = new SwitchRecogniser(kernel.image, functions, MOST_FUNCTION_BYTES);
  }

  /**
   * What is proven about `site` from the image as it was at discovery, and what it can be replaced by; otherwise marks
   * it as ignored and says why. Takes its time and needs no pause.
   */
  prepare(site: Site): Prepared | Outcome {
    const proof = this.#proofOf(site);
    if (typeof proof === 'string') return ignore(site, proof);
    return { proof, plans: planHandlers(proof, this.kernel.base, this.handler) };
  }

  /**
   * Relocates `site`, or marks it as ignored with the reason. For a quiescent guest.
   *
   * @throws MemtablesError of the hypervisor or the journal; the guest is as before then
   */
  relocate(site: Site, { proof, plans }: Prepared): Outcome {
    if (this.redirections.overlapping(site.rip, proof.length) !== undefined)
      return ignore(site, 'overlaps-hook');
    if (!this.#isUnchanged(proof)) return ignore(site, 'code-has-changed');
    const placed = this.#place(plans);
    return typeof placed === 'string' ? ignore(site, placed) : this.#install(site, proof, plans, placed);
  }

  #proofOf(site: Site): FoundSwitch | string {
    const { kernel } = this;
    if (!kernel.contains(site.rip)) return 'load-outside-kernel';
    const rva = Number(site.rip - kernel.base);
    const unstable = this.#instabilityAt(rva);
    if (unstable !== undefined) return unstable;
    const proof = this.#recogniser.prove(rva);
    if (!proof.found) return proof.reason;
    if (site.table !== kernel.base + BigInt(proof.table)) return 'another-table-was-read';
    const tables = [proof.table, ...(proof.byteTable === undefined ? [] : [proof.byteTable.table])];
    const unstableTable = tables.map((table) => this.#instabilityAt(table)).find((why) => why !== undefined);
    return unstableTable === undefined ? proof : `table-${unstableTable}`;
  }

  #instabilityAt(rva: number): string | undefined {
    const section = this.kernel.image.sectionAt(rva);
    return section === undefined ? 'outside-sections' : instabilityOf(section);
  }

  /** Whether all that the proof rests on is in memory now as it was at discovery. */
  #isUnchanged({ rva, table, entries, byteTable }: FoundSwitch): boolean {
    const code = functionAt(this.kernel.image, this.functions, rva)!.ranges;
    const ranges = [...code, { begin: table, end: table + entries * ENTRY_BYTES }];
    if (byteTable !== undefined) {
      ranges.push({ begin: byteTable.table, end: byteTable.table + byteTable.entries });
    }
    return ranges.every(({ begin, end }) => {
      const now = this.readOriginal(this.kernel.base + BigInt(begin), end - begin);
      return now !== undefined && Buffer.compare(now, this.kernel.image.read(begin, end - begin)) === 0;
    });
  }

  /** The fastest handler for which there is slack, with its place; otherwise the reason why there is none. */
  #place(plans: readonly HandlerPlanning[]): Placed | string {
    // The last encoder is the one that asks least of a load.
    let reason: string = plans.at(-1)!.refused ?? 'no-slack';
    for (const candidate of affordable(plans, this.slack.freeBytes)) {
      const slack = this.#allocate(candidate.size);
      if (slack === undefined) {
        reason = 'no-slack';
        continue;
      }
      const plan = candidate.parts[0]!.at(slack.gva);
      if (plan.refused === undefined) return { candidate, plan, slack };
      reason = plan.refused;
      this.slack.free(slack);
    }
    return reason;
  }

  #allocate(size: number): SlackBlock | undefined {
    try {
      return this.slack.allocate(size);
    } catch (error) {
      if (error instanceof MemtablesError && error.code === 'SLACK_EXHAUSTED') return undefined;
      throw error;
    }
  }

  #install(
    site: Site,
    proof: FoundSwitch,
    plans: readonly HandlerPlanning[],
    { candidate, plan, slack }: Placed,
  ): Outcome {
    const label = `${proof.form} load at ${hex(site.rip)}`;
    const patches = { code: plan.handler, jump: plan.site };
    site.redirection = this.redirections.install('relocation', label, patches, slack, plan.evacuation);
    site.state = 'relocated';
    return {
      type: 'relocated',
      site: site.rip,
      table: site.table,
      form: proof.form,
      entries: proof.entries,
      handler: slack.gva,
      encoder: candidate.encoder,
      handlerBytes: slack.size,
      passedOver: passedOver(plans, candidate),
      hits: site.hits,
    };
  }
}

function ignore(site: Site, reason: string): Outcome {
  site.state = 'ignored';
  site.refusal = reason;
  return { type: 'refused', site: site.rip, table: site.table, reason };
}

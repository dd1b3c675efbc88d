import { MemtablesError } from '../errors.js';
import { planSeedHandler, seedHandlerSize } from '../handlers/seed.js';
import type { Kernel } from '../nt/kernel.js';
import type { FunctionTable } from '../nt/pdata.js';
import type { SlackAllocator, SlackBlock } from '../slack/allocator.js';
import { instabilityOf } from '../slack/regions.js';
import { functionAt } from '../switches/functions.js';
import { type ProvenSwitch, SwitchRecogniser } from '../switches/table.js';
import { type Gva, hex } from '../vmi/address.js';
import type { Redirections } from './redirections.js';
import type { EngineEvent } from './report.js';
import type { Site } from './sites.js';

type Outcome = Extract<EngineEvent, { type: 'relocated' | 'refused' }>;

const ENTRY_BYTES = 4;
/** Trapped vCPUs stand still while a load is proven: no function of a kernel is larger. */
const MOST_FUNCTION_BYTES = 64 * 1024;
/** Operand and address sizes of what the recogniser accepts. */
const LOAD_BITS = { dstBits: 32, addressBits: 64 } as const;

/** Replaces a hot table load by a jump to a handler that loads immediates. */
export class Relocator {
  readonly #recogniser: SwitchRecogniser;

  constructor(
    private readonly kernel: Kernel,
    private readonly functions: FunctionTable,
    private readonly slack: SlackAllocator,
    private readonly redirections: Redirections,
    private readonly readOriginal: (gva: Gva, length: number) => Uint8Array | undefined,
  ) {
    this.#recogniser = new SwitchRecogniser(kernel.image, functions, MOST_FUNCTION_BYTES);
  }

  /**
   * What is proven about `site` from the image as it was at discovery; otherwise marks it as ignored and says why.
   * Takes its time and needs no pause.
   */
  prove(site: Site): ProvenSwitch | Outcome {
    const proof = this.#proofOf(site);
    return typeof proof === 'string' ? ignore(site, proof) : proof;
  }

  /**
   * Relocates `site`, or marks it as ignored with the reason. For a quiescent guest.
   *
   * @throws MemtablesError of the hypervisor or the journal; the guest is as before then
   */
  relocate(site: Site, proof: ProvenSwitch): Outcome {
    if (this.redirections.overlapping(site.rip, proof.length) !== undefined)
      return ignore(site, 'overlaps-hook');
    if (!this.#isUnchanged(proof)) return ignore(site, 'code-has-changed');
    const slack = this.#allocate(proof.entries);
    if (slack === undefined) return ignore(site, 'no-slack');
    return this.#install(site, proof, slack);
  }

  #proofOf(site: Site): ProvenSwitch | string {
    const { kernel } = this;
    if (!kernel.contains(site.rip)) return 'load-outside-kernel';
    const rva = Number(site.rip - kernel.base);
    const unstable = this.#instabilityAt(rva);
    if (unstable !== undefined) return unstable;
    const proof = this.#recogniser.prove(rva);
    if (!proof.proven) return proof.reason;
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
  #isUnchanged({ rva, table, entries, byteTable }: ProvenSwitch): boolean {
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

  #allocate(entries: number): SlackBlock | undefined {
    try {
      return this.slack.allocate(seedHandlerSize(entries));
    } catch (error) {
      if (error instanceof MemtablesError && error.code === 'SLACK_EXHAUSTED') return undefined;
      throw error;
    }
  }

  #install(site: Site, proof: ProvenSwitch, slack: SlackBlock): Outcome {
    const load = {
      ...LOAD_BITS,
      gva: site.rip,
      length: proof.length,
      dst: proof.destination,
      idx: proof.index,
      base: proof.base,
    };
    const plan = planSeedHandler(load, Uint32Array.from(proof.values), slack.gva);
    if (plan.refused !== undefined) {
      this.slack.free(slack);
      return ignore(site, plan.refused);
    }
    const label = `${proof.form} load at ${hex(site.rip)}`;
    const patches = { code: plan.handler, jump: plan.site };
    site.redirection = this.redirections.install('relocation', label, patches, slack);
    site.state = 'relocated';
    return {
      type: 'relocated',
      site: site.rip,
      table: site.table,
      form: proof.form,
      entries: proof.entries,
      handler: slack.gva,
      handlerBytes: slack.size,
      hits: site.hits,
    };
  }
}

function ignore(site: Site, reason: string): Outcome {
  site.state = 'ignored';
  site.refusal = reason;
  return { type: 'refused', site: site.rip, table: site.table, reason };
}

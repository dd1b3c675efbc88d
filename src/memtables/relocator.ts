import type { HandlerLayout } from '../handlers/plan.js';
import {
  affordable,
  type Candidate,
  type HandlerChoice,
  type HandlerPlanning,
  passedOver,
  planHandlers,
} from '../handlers/planner.js';
import { type KernelImage, NT } from '../nt/kernel-image.js';
import type { KernelImages } from '../nt/kernel-images.js';
import type { LiveRange } from '../safety/ranges.js';
import { instabilityOf } from '../slack/regions.js';
import type { SlackOfImages } from '../slack/slack-of-images.js';
import { functionAt } from '../switches/functions.js';
import type { FoundSwitch } from '../switches/table.js';
import { type Gva, hex } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { type PlacedHandler, Placer } from './placer.js';
import type { Recognisers } from './recognisers.js';
import type { Redirections } from './redirections.js';
import type { EngineEvent } from './report.js';
import { ignore, ignoreAll, PATIENT_TRIES, type Site, type SiteTable } from './sites.js';
import { tablesOf } from './tables.js';
import { Vacancy } from './vacancy.js';

export type Outcome = Extract<EngineEvent, { type: 'relocated' | 'refused' }>;

/** Something stands inside the code to be replaced; it may be gone when the guest has run on. */
const IN_USE = 'in-use';
/** After so many a switch is refused: a thread that hardly does anything else stands there whenever the guest is stopped. */
const MOST_TRIES = 70;

/** What a switch can be replaced by, in whole or in part. */
interface Way {
  readonly candidate: Candidate;
  readonly parts: readonly HandlerLayout[];
}

interface Placed {
  readonly candidate: Candidate;
  readonly handlers: readonly PlacedHandler[];
  /** Why others have no place, by name. */
  readonly failed: Readonly<Record<string, string>>;
}

/** A hot load, the switch that it belongs to, and what that can be replaced by. */
export interface Prepared {
  readonly hot: Site;
  readonly image: KernelImage;
  readonly proof: FoundSwitch;
  /** The switch's loads: first that of a dword, by which it is known. */
  readonly loads: readonly Site[];
  readonly plans: readonly HandlerPlanning[];
}

/** Replaces the loads of a switch by jumps to handlers that load immediates. */
export class Relocator {
  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly images: KernelImages,
    private readonly recognisers: Recognisers,
    private readonly sites: SiteTable,
    private readonly slack: SlackOfImages,
    private readonly redirections: Redirections,
    private readonly readOriginal: (gva: Gva, length: number) => Uint8Array | undefined,
    private readonly handler: HandlerChoice,
  ) {}

  /**
   * What is proven about the switch of `hot` from its image as it was first read, and what it can be replaced by;
   * otherwise marks the load as ignored and says why. Takes its time and needs no pause.
   */
  prepare(hot: Site): Prepared | Outcome {
    const image = this.images.at(hot.rip);
    if (image === undefined) return refuse([hot], 'load-outside-kernel');
    if (image === 'unreadable') return refuse([hot], 'image-unreadable');
    const proof = this.#proofOf(hot, image);
    if (typeof proof === 'string') return refuse([hot], proof, image);
    const loads = tablesOf(proof).flatMap(
      ({ load, begin }) => this.sites.find(image.gva(load), image.gva(begin)) ?? [],
    );
    return { hot, image, proof, loads, plans: planHandlers(proof, image.base, this.handler) };
  }

  /** What has to be known of the threads when these switches are relocated, while the guest is quiescent once. */
  vacancyFor(batch: readonly Prepared[]): Vacancy {
    return new Vacancy(this.hypervisor, this.images.nt, batch.flatMap(spanOf));
  }

  /**
   * Relocates the switch, or marks its loads as ignored with the reason; `in-use` when that has to be tried again. For
   * a quiescent guest.
   *
   * @throws MemtablesError of the hypervisor or the journal; the guest is as before then
   */
  relocate(prepared: Prepared, vacancy: Vacancy): Outcome | typeof IN_USE {
    const { hot, image, proof, loads, plans } = prepared;
    if (!this.#isUnchanged(image, proof)) return refuse(loads, 'code-has-changed', image);
    const mayWait = hot.tries < PATIENT_TRIES;
    const place = (among: typeof plans) =>
      this.#place(plans, among, new Placer(this.slack.for(image)), vacancy);
    let placed = mayWait ? place(plans) : place(plans.filter(isUnobstructed));
    // Nothing else fits.
    if (placed === IN_USE && !mayWait) placed = place(plans);
    if (placed === IN_USE && hot.tries < MOST_TRIES) {
      hot.tries++;
      return IN_USE;
    }
    return typeof placed === 'string' ? refuse(loads, placed, image) : this.#install(prepared, placed);
  }

  #proofOf(site: Site, image: KernelImage): FoundSwitch | string {
    const rva = Number(site.rip - image.base);
    const unstable = instabilityAt(image, rva);
    if (unstable !== undefined) return unstable;
    const proof = this.recognisers.of(image).prove(rva);
    if (!proof.found) return proof.reason;
    const tables = tablesOf(proof);
    const own = tables.find(({ load }) => load === rva);
    if (own === undefined || site.table !== image.gva(own.begin)) return 'another-table-was-read';
    const unstableTable = tables
      .map(({ begin }) => instabilityAt(image, begin))
      .find((why) => why !== undefined);
    return unstableTable === undefined ? proof : `table-${unstableTable}`;
  }

  /** Whether all that the proof rests on is in memory now as it was when the image was read. */
  #isUnchanged(image: KernelImage, proof: FoundSwitch): boolean {
    if (!this.images.isCurrent(image)) return false;
    const code = functionAt(image.image, image.functions, proof.rva)!.ranges;
    return [...code, ...tablesOf(proof)].every(({ begin, end }) => {
      const now = this.readOriginal(image.gva(begin), end - begin);
      return now !== undefined && Buffer.compare(now, image.image.read(begin, end - begin)) === 0;
    });
  }

  /** The fastest of `possible` for which there is slack, with their places; otherwise the reason why there are none. */
  #place(
    plans: readonly HandlerPlanning[],
    possible: readonly HandlerPlanning[],
    placer: Placer,
    vacancy: Vacancy,
  ): Placed | string {
    // The last encoder is the one that asks least of a load.
    let reason: string = plans.at(-1)!.refused ?? 'no-slack';
    const failed: Record<string, string> = {};
    for (const plan of plans) {
      if (plan.refused !== undefined || possible.includes(plan)) continue;
      reason = IN_USE;
      failed[plan.name] = reason;
    }
    for (const { candidate, parts } of waysOf(possible, placer.freeBytes)) {
      const handlers = this.#placeUnobstructed(parts, placer, vacancy);
      if (typeof handlers !== 'string') return { candidate, handlers, failed };
      if (handlers === IN_USE) return IN_USE;
      // What else is in the way says more than that there is no slack.
      if (handlers !== 'no-slack' || Object.keys(failed).length === 0) reason = handlers;
      failed[candidate.name] ??= handlers;
    }
    return reason;
  }

  #placeUnobstructed(
    parts: readonly HandlerLayout[],
    placer: Placer,
    vacancy: Vacancy,
  ): readonly PlacedHandler[] | string {
    const handlers = placer.place(parts);
    if (typeof handlers === 'string') return handlers;
    try {
      const obstacle = this.#obstacleTo(handlers, vacancy);
      if (obstacle === undefined) return handlers;
      placer.release(handlers);
      return obstacle;
    } catch (error) {
      placer.release(handlers);
      throw error;
    }
  }

  #obstacleTo(handlers: readonly PlacedHandler[], vacancy: Vacancy): string | undefined {
    const overlaps = handlers.some(
      ({ plan: { site } }) => this.redirections.overlapping(site.gva, site.bytes.length) !== undefined,
    );
    if (overlaps) return 'overlaps-hook';
    const divided = handlers.flatMap(({ plan: { site, interior } }) => (interior.length > 0 ? [site] : []));
    const canBeReplaced = divided.every(({ gva, bytes }) => vacancy.isVacant(gva, bytes.length));
    return canBeReplaced ? undefined : IN_USE;
  }

  #install({ hot, image, proof, loads, plans }: Prepared, { candidate, handlers, failed }: Placed): Outcome {
    const label = `${proof.form} switch at ${hex(image.gva(proof.rva))}`;
    const installed = this.redirections.installAll(
      handlers.map(({ plan, slack }) => ({
        kind: 'relocation',
        label,
        code: plan.handler,
        jump: plan.site,
        slack,
        isDivided: plan.interior.length > 0,
        evacuation: plan.evacuation,
        ...(plan.fallback === undefined ? {} : { fallback: plan.fallback }),
      })),
    );
    for (const load of loads) {
      const part = handlers.findIndex(({ replaces }) => replaces.includes(load.rip));
      if (part === -1) ignore(load, 'only-other-load-relocated');
      else this.sites.replace(load, installed[part]!);
    }
    return {
      type: 'relocated',
      site: image.gva(proof.rva),
      table: image.gva(proof.table),
      form: proof.form,
      entries: proof.entries,
      loads: loads.flatMap(({ rip: site, hits, state }) => {
        const stillReached = handlers.some(({ replaces }) => replaces.indexOf(site) > 0);
        return state === 'relocated' ? [{ site, hits, stillReached }] : [];
      }),
      handler: handlers[0]!.slack.gva,
      handlers: handlers.map(({ plan, slack }) => ({
        site: plan.site.gva,
        gva: slack.gva,
        bytes: slack.size,
      })),
      encoder: candidate.encoder,
      handlerBytes: handlers.reduce((total, { slack }) => total + slack.size, 0),
      passedOver: { ...passedOver(plans, candidate), ...failed },
      hits: hot.hits,
      ...moduleOf(image),
    };
  }
}

function instabilityAt({ image }: KernelImage, rva: number): string | undefined {
  const section = image.sectionAt(rva);
  return section === undefined ? 'outside-sections' : instabilityOf(section);
}

/** Nothing stands in the way of code that is reached from one instruction. */
function isUnobstructed({ encoder }: HandlerPlanning): boolean {
  return encoder !== 'inline';
}

/** What a handler may replace of a switch, where that can be more than one instruction. */
function spanOf({ image, proof }: Prepared): LiveRange[] {
  const { rva, byteTable, jmp, adjacent } = proof;
  if (!adjacent) return [];
  const isTogether = byteTable !== undefined && byteTable.rva + byteTable.length === rva;
  const begin = isTogether ? byteTable.rva : rva;
  return [{ start: image.gva(begin), end: image.gva(jmp.rva + jmp.length), owner: '' }];
}

/** Where no handlers for the whole switch fit, one of its two loads less is a gain, too. */
function waysOf(plans: readonly HandlerPlanning[], freeBytes: number): Way[] {
  const candidates = affordable(plans, freeBytes);
  const whole = candidates.map((candidate) => ({ candidate, parts: candidate.parts }));
  const halves = candidates
    .filter(({ parts }) => parts.length > 1)
    .flatMap((candidate) => candidate.parts.map((part) => ({ candidate, parts: [part] })));
  return [...whole, ...halves];
}

function refuse(loads: readonly Site[], reason: string, image?: KernelImage): Outcome {
  ignoreAll(loads, reason);
  const { rip: site, table } = loads[0]!;
  return { type: 'refused', site, table, reason, ...moduleOf(image) };
}

function moduleOf(image: KernelImage | undefined): { module?: string } {
  return image === undefined || image.name === NT ? {} : { module: image.name };
}

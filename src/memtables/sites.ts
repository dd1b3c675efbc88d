import type { Gva } from '../vmi/address.js';
import type { Redirection } from './redirections.js';

/** After so many tries a switch is no longer kept waiting for the code it would best be replaced by. */
export const PATIENT_TRIES = 20;

/** A table load that has trapped: the instruction, and the table it read. */
export interface Site {
  readonly rip: Gva;
  /** The load's base register plus its displacement. */
  readonly table: Gva;
  hits: number;
  /** Violations that were under way when it was relocated. */
  stale: number;
  /** It is to be relocated however often it has trapped. */
  isPlanned: boolean;
  state: 'counted' | 'queued' | 'relocated' | 'ignored';
  /** How often it could not be replaced because something stood inside the code to be replaced. */
  tries: number;
  /** Why it is ignored; absent where another load of its switch says so. */
  refusal?: string | undefined;
  /** How often the handler in its place was used with an index beyond the bound, and loaded from the table. */
  beyondBound: number;
  /** What has replaced it; no thread executes it any more. */
  redirection?: Redirection;
}

/** Nothing more is done about the load. */
export function ignore(site: Site, refusal?: string): void {
  site.state = 'ignored';
  site.refusal = refusal;
}

/** Nothing more is done about the loads of a switch, which counts once. */
export function ignoreAll([first, ...others]: readonly Site[], refusal: string): void {
  if (first !== undefined) ignore(first, refusal);
  for (const other of others) ignore(other);
}

/** A guest can make up loads without end; real kernels have a few thousand, each with one table. */
const MAX_LOADS = 65_536;
const MAX_TABLES_PER_LOAD = 16;

/** The sites seen so far, by RIP and table. */
export class SiteTable {
  readonly #byRip = new Map<Gva, Site[]>();
  readonly #byFallback = new Map<Gva, Site>();

  /** The site, made when it is new; `undefined` when there are too many already. */
  find(rip: Gva, table: Gva): Site | undefined {
    let sites = this.#byRip.get(rip);
    if (sites === undefined) {
      if (this.#byRip.size >= MAX_LOADS) return undefined;
      sites = [];
      this.#byRip.set(rip, sites);
    }
    let site = sites.find((known) => known.table === table);
    if (site === undefined) {
      if (sites.length >= MAX_TABLES_PER_LOAD) return undefined;
      site = { rip, table, hits: 0, stale: 0, isPlanned: false, state: 'counted', tries: 0, beyondBound: 0 };
      sites.push(site);
    }
    return site;
  }

  /** No thread executes the load any more, but for what is under way. */
  replace(site: Site, redirection: Redirection): void {
    site.state = 'relocated';
    site.refusal = undefined;
    site.redirection = redirection;
    if (redirection.fallback !== undefined) this.#byFallback.set(redirection.fallback, site);
  }

  /** The site whose load has a copy in slack, for indices beyond the bound, at `rip`. */
  ofFallback(rip: Gva): Site | undefined {
    const site = this.#byFallback.get(rip);
    return site?.redirection?.fallback === rip ? site : undefined;
  }

  /** The site whose load at `rip` has been replaced: only what had been under way still executes it. */
  relocatedAt(rip: Gva): Site | undefined {
    return this.#byRip.get(rip)?.find(({ redirection }) => redirection?.jump !== undefined);
  }

  /** The loads that `redirection` has replaced. */
  replacedBy(redirection: Redirection): Site[] {
    return [...this.all()].filter((site) => site.redirection === redirection);
  }

  /** Forgets the loads that `redirection` has replaced: their code is gone. */
  forget(redirection: Redirection): void {
    for (const [rip, sites] of this.#byRip) {
      if (sites.some((site) => site.redirection === redirection)) this.#byRip.delete(rip);
    }
  }

  *all(): Generator<Site> {
    for (const sites of this.#byRip.values()) yield* sites;
  }
}

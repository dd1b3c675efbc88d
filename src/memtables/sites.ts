import type { Gva } from '../vmi/address.js';
import type { Redirection } from './redirections.js';

/** A table load that has trapped: the instruction, and the table it read. */
export interface Site {
  readonly rip: Gva;
  /** The load's base register plus its displacement. */
  readonly table: Gva;
  hits: number;
  state: 'counted' | 'queued' | 'relocated' | 'ignored';
  /** Why it is ignored. */
  refusal?: string;
  redirection?: Redirection;
}

/** A guest can make up loads without end; real kernels have a few thousand, each with one table. */
const MAX_LOADS = 65_536;
const MAX_TABLES_PER_LOAD = 16;

/** The sites seen so far, by RIP and table. */
export class SiteTable {
  readonly #byRip = new Map<Gva, Map<Gva, Site>>();

  /** The site, made when it is new; `undefined` when there are too many already. */
  find(rip: Gva, table: Gva): Site | undefined {
    let tables = this.#byRip.get(rip);
    if (tables === undefined) {
      if (this.#byRip.size >= MAX_LOADS) return undefined;
      tables = new Map();
      this.#byRip.set(rip, tables);
    }
    let site = tables.get(table);
    if (site === undefined) {
      if (tables.size >= MAX_TABLES_PER_LOAD) return undefined;
      site = { rip, table, hits: 0, state: 'counted' };
      tables.set(table, site);
    }
    return site;
  }

  /** True when the instruction at `rip` is a jump of ours now. */
  isRelocated(rip: Gva): boolean {
    const sites = this.#byRip.get(rip)?.values() ?? [];
    for (const { redirection } of sites) if (redirection?.jump !== undefined) return true;
    return false;
  }

  *all(): Generator<Site> {
    for (const tables of this.#byRip.values()) yield* tables.values();
  }
}

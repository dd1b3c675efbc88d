import type { Encoder } from '../handlers/planner.js';
import type { Gva } from '../vmi/address.js';

/** What the engine tells its user while it works. */
export type EngineEvent =
  | {
      readonly type: 'hooked';
      readonly name: string;
      readonly function: Gva;
      readonly trampoline: Gva;
      readonly replacedBytes: number;
    }
  | {
      readonly type: 'relocated';
      /** The switch's load of a dword, by which the switch is known, and its table. */
      readonly site: Gva;
      readonly table: Gva;
      readonly form: 'one-level' | 'two-level';
      readonly entries: number;
      readonly loads: readonly RelocatedLoad[];
      /** The first of `handlers`. */
      readonly handler: Gva;
      /** One, or one for each load. */
      readonly handlers: readonly Handler[];
      readonly encoder: Encoder;
      /** Of all handlers. */
      readonly handlerBytes: number;
      /** Why others were not taken, by the encoder and its packing; not those that are slower. */
      readonly passedOver: Readonly<Record<string, string>>;
      /** Of the load that had become hot. */
      readonly hits: number;
      /** The file name of the module that it is in; absent for NT. */
      readonly module?: string;
    }
  | {
      readonly type: 'refused';
      readonly site: Gva;
      readonly table: Gva;
      readonly reason: string;
      /** As above; absent also where it is in none. */
      readonly module?: string;
    }
  | {
      /** What hidden bytes make trap, before anything is relocated because of it. */
      readonly type: 'planned';
      /** That hold hidden bytes, or will once the switches are relocated; only those not planned before. */
      readonly pages: readonly Gva[];
      /** With a table on these pages. */
      readonly switches: number;
    }
  | { readonly type: 'taken-back'; readonly owner: string; readonly at: Gva }
  /** The guest has unloaded the module that a change was made in. */
  | { readonly type: 'module-unloaded'; readonly owner: string; readonly at: Gva }
  | { readonly type: 'unload-blocked'; readonly where: readonly string[] };

/** Code of ours in slack, and where the guest's code leads to it. */
export interface Handler {
  readonly site: Gva;
  readonly gva: Gva;
  readonly bytes: number;
}

/** A load that no thread executes any more. */
export interface RelocatedLoad {
  readonly site: Gva;
  /** How often it had trapped. */
  readonly hits: number;
  /** A thread that was between the two loads of the switch still comes to this one. */
  readonly stillReached: boolean;
}

/** How often a table load has trapped, since the engine attached. */
export interface LoadCounts {
  readonly site: Gva;
  /** The table that it read. */
  readonly table: Gva;
  readonly hits: number;
  /** Violations that came after it had been relocated: they were under way. */
  readonly stale: number;
}

/** The engine's counters since it attached. */
export interface Statistics {
  /** EPT violations seen, of every kind. */
  readonly violations: number;
  /** Violations by table loads that were counted towards a relocation. */
  readonly tableLoads: number;
  /** Switches with a relocated load. */
  readonly relocations: number;
  /** Switches, and loads that are of none, that will not be relocated, by reason. */
  readonly refused: Readonly<Record<string, number>>;
  /** Violations by loads that were already under way when they were relocated. */
  readonly staleEvents: number;
  /** Violations by `guarded` handlers, which leave an index beyond the bound to a copy of the load. */
  readonly beyondBound: number;
  /** Reads answered with original bytes, by width (`8-byte`) or form (`rep movs`). */
  readonly cloakedReads: Readonly<Record<string, number>>;
  /** Guest writes over hidden bytes. */
  readonly cloakedWrites: number;
  /** Reads that are no table loads: how many, and of how many instructions. */
  readonly otherReads: { readonly reads: number; readonly readers: number };
  readonly hooks: number;
  readonly trappedFrames: number;
  readonly slack: { readonly bytes: number; readonly free: number };
}

export interface UnloadReport {
  /** Thread-safety scans made. */
  readonly scans: number;
  /** Scans that found a live pointer into replaced code, or could not tell. */
  readonly blocked: number;
  /** Live pointers found inside handlers, over all scans. */
  readonly inHandlerAtScan: number;
  /** Who was taken out of handlers: vCPUs, and threads that an interrupt had stopped there. */
  readonly evacuated: { readonly vcpus: number; readonly threads: number };
  readonly seconds: number;
}

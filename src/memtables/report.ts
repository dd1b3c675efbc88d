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
      readonly site: Gva;
      readonly table: Gva;
      readonly form: 'one-level' | 'two-level';
      readonly entries: number;
      readonly handler: Gva;
      readonly encoder: Encoder;
      readonly handlerBytes: number;
      /** Why others were not taken, by the encoder and its packing; not those that are slower. */
      readonly passedOver: Readonly<Record<string, string>>;
      readonly hits: number;
    }
  | { readonly type: 'refused'; readonly site: Gva; readonly table: Gva; readonly reason: string }
  | { readonly type: 'taken-back'; readonly owner: string; readonly at: Gva }
  | { readonly type: 'unload-blocked'; readonly where: readonly string[] };

/** The engine's counters since it attached. */
export interface Statistics {
  /** EPT violations seen, of every kind. */
  readonly violations: number;
  /** Violations by table loads that were counted towards a relocation. */
  readonly tableLoads: number;
  readonly relocations: number;
  /** Table loads that will not be relocated, by reason. */
  readonly refused: Readonly<Record<string, number>>;
  /** Violations of a site that were already under way when it was relocated. */
  readonly staleEvents: number;
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
  /** vCPUs that were taken out of handlers, by setting their registers. */
  readonly evacuated: number;
  readonly seconds: number;
}

import type { Gva } from '../vmi/address.js';
import type { GprName } from '../x86/registers.js';
import type { Evacuation } from './evacuation.js';

/** Bytes that belong at an address of the guest. */
export interface Patch {
  readonly gva: Gva;
  readonly bytes: Buffer;
}

/** A table load to replace: `mov dst, [base + idx*4 + disp]`, or `movzx dst, byte [base + idx + disp]`. */
export interface LoadSite {
  readonly gva: Gva;
  /** Bytes of the instruction. */
  readonly length: number;
  readonly dst: GprName;
  /** Width of the destination register. */
  readonly dstBits: 8 | 16 | 32 | 64;
  readonly idx: GprName;
  readonly base: GprName;
  /** What `base` is proven to hold at the load. */
  readonly baseValue: Gva;
  /** 32 when the instruction has a 67h prefix. */
  readonly addressBits: 32 | 64;
}

/** A handler with its place. Any RIP inside `handler`, from its first to its last byte, is in use. */
export interface HandlerPlan {
  readonly refused?: undefined;
  /** Written first: the site must never lead to bytes that are not there yet. */
  readonly handler: Patch;
  /** What replaces the guest's code: a jump to the handler and NOPs, or code that needs none. */
  readonly site: Patch;
  /**
   * The instructions of the guest that `site` replaces besides the first: no thread may stand at one of them when it is
   * written.
   */
  readonly interior: readonly Gva[];
  /** Offset in the handler of the block of entry 0. */
  readonly blocks: number;
  /** A copy of the load, which indices beyond the bound execute: it traps as the load itself did. */
  readonly fallback?: Gva;
  /** Also for a thread inside of what `site` has become. */
  readonly evacuation: Evacuation;
}

/** A handler without a place: what it takes is known before slack is taken for it. */
export interface HandlerLayout {
  readonly refused?: undefined;
  /** In bytes. */
  readonly size: number;
  /** The loads that no thread executes any more once the handler is in place. The first is where the site begins. */
  readonly replaces: readonly Gva[];
  at(handler: Gva): HandlerPlan | Refused<'jump-out-of-range'>;
}

/** The answer of a planner that will not do it, with the reason as a word. */
export interface Refused<Reason extends string> {
  readonly refused: Reason;
}

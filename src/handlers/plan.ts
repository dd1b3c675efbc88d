import type { Gva } from '../vmi/address.js';
import type { GprName } from '../x86/registers.js';
import type { Evacuation } from './evacuation.js';

/** Bytes that belong at an address of the guest. */
export interface Patch {
  readonly gva: Gva;
  readonly bytes: Buffer;
}

/** The table load to replace: `mov dst, [base + idx*scale + disp]`. */
export interface TableLoad {
  readonly gva: Gva;
  /** Bytes of the instruction. */
  readonly length: number;
  readonly dst: GprName;
  /** Width of the destination register. */
  readonly dstBits: 8 | 16 | 32 | 64;
  readonly idx: GprName;
  readonly base: GprName;
  /** What `base` holds at the load; absent where that is not proven. */
  readonly baseValue?: Gva;
  /** 32 when the instruction has a 67h prefix. */
  readonly addressBits: 32 | 64;
}

/** A handler that can replace a load. Any RIP inside `handler`, from its first to its last byte, is in use. */
export interface HandlerPlan {
  readonly refused?: undefined;
  /** Written first: the site must never lead to bytes that are not there yet. */
  readonly handler: Patch;
  /** What the load becomes: a jump to the handler, NOPs up to its length. */
  readonly site: Patch;
  /** Offset in the handler of the block of entry 0. */
  readonly blocks: number;
  /** Absent of a handler that a vCPU cannot be taken out of. */
  readonly evacuation?: Evacuation;
}

/** A handler without a place: what it takes is known before slack is taken for it. */
export interface HandlerLayout {
  readonly refused?: undefined;
  /** In bytes. */
  readonly size: number;
  at(handler: Gva): HandlerPlan | Refused<'jump-out-of-range'>;
}

/** The answer of a planner that will not do it, with the reason as a word. */
export interface Refused<Reason extends string> {
  readonly refused: Reason;
}

import type { Gva } from '../vmi/address.js';
import { computedJump } from './computed-jump.js';
import { movImmediate } from './encoding.js';
import { JUMP_LENGTH } from './jump.js';
import type { HandlerLayout, Refused, TableLoad } from './plan.js';
import { type LoadRefusal, refusalOf } from './refusal.js';
import { stridedLayout } from './strided.js';

/** How an entry becomes the address of its case: `add dst, base`, right behind the load and in front of `jmp dst`. */
export interface Dispatch {
  readonly add: Uint8Array;
  /** What the `add` adds to an entry. */
  readonly imageBase: Gva;
}

export type FusedRefusal =
  | LoadRefusal
  /** dst is idx, and no other register is known to hold an address. */
  | 'no-register-for-address'
  /** With what else a block holds, it does not fit. */
  | 'add-too-long';

const STRIDE = 16;

/**
 * Lays out the handler that does the whole switch: for every index k below `entries.length` it leaves the registers,
 * flags and RIP that the load, the `add` and the `jmp` would have left, and touches no memory. One indirect branch is
 * left, where the switch had one.
 *
 * An index out of range leads anywhere: the caller has proven the bound. Nothing may branch to the `add` or the `jmp`.
 */
export function fusedLayout(
  load: TableLoad,
  dispatch: Dispatch,
  entries: Uint32Array,
): HandlerLayout | Refused<FusedRefusal> {
  const refused = refusalOf(load, entries.length);
  if (refused !== undefined) return { refused };
  const jump = computedJump(load, STRIDE);
  if (jump === undefined) return { refused: 'no-register-for-address' };
  const longest = movImmediate(load.dst, 0).length + dispatch.add.length + JUMP_LENGTH;
  if (longest > STRIDE) return { refused: 'add-too-long' };
  const rip = load.gva + BigInt(load.length);
  const blocks = Array.from(entries, (entry) => ({
    steps: [
      { code: movImmediate(load.dst, entry), exit: { rip, entry } },
      // For the flags, too.
      { code: [...dispatch.add], exit: { rip } },
    ],
    leadsTo: BigInt.asUintN(64, dispatch.imageBase + BigInt(entry)),
  }));
  return stridedLayout(load, jump, STRIDE, entries, blocks);
}

import { detour } from './detour.js';
import { type Packing, roomy, shared } from './packing.js';
import type { HandlerLayout, Refused } from './plan.js';
import { type Replaced, replacedSwitch, type WholeSwitch, type WholeSwitchRefusal } from './replaced.js';

/**
 * How the blocks stand: `roomy` 16 bytes apart, or a little more; otherwise shared by indices that lead to the same,
 * with a jump for each index in front: `spread` 8 bytes apart, `shared` 5 bytes, `short` 2 bytes. The fastest first.
 */
export const SWITCH_PACKINGS = ['roomy', 'spread', 'shared', 'short'] as const;
export type SwitchPacking = (typeof SWITCH_PACKINGS)[number];

export type SwitchRefusal =
  | WholeSwitchRefusal
  /** dst is idx, and no other register is known to hold an address. */
  | 'no-register-for-address'
  /** The blocks cannot stand like this. */
  | 'does-not-fit';

/**
 * Lays out the handler that does the whole switch: for every index it leaves the registers, flags and RIP that the
 * loads, the `add` and the `jmp` would have left, and touches no memory. One indirect branch is left, where the switch
 * had one.
 *
 * An index out of range leads anywhere: the caller has proven the bound.
 */
export function fusedLayout(
  whole: WholeSwitch,
  packing: SwitchPacking,
): HandlerLayout | Refused<SwitchRefusal> {
  const replaced = replacedSwitch(whole);
  if ('refused' in replaced) return replaced;
  const packed = packSwitch(replaced, packing);
  return packed === undefined ? { refused: 'does-not-fit' } : detour(replaced, packed);
}

/** `undefined` where the blocks cannot stand like this. */
export function packSwitch(replaced: Replaced, packing: SwitchPacking): Packing | undefined {
  switch (packing) {
    case 'roomy':
      return roomy(replaced);
    case 'spread':
      return shared(replaced, 8);
    case 'shared':
      return shared(replaced, 5);
    case 'short':
      return shared(replaced, 2);
  }
}

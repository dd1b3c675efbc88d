import { detour } from './detour.js';
import { type Packing, shared, spaced, tight } from './packing.js';
import type { HandlerLayout, LoadSite, Refused } from './plan.js';
import { type Replaced, type ReplacedRefusal, replacedLoad } from './replaced.js';

/**
 * How the blocks stand: `roomy` 16 bytes apart; `dense` without a gap, or nearly; `tight` 8 bytes apart, with a short
 * jump to a shared one; `shared`: jumps 5 bytes apart to blocks shared by entries that are alike; `short`: the same with
 * short jumps. The fastest first.
 */
export const LEAN_PACKINGS = ['roomy', 'dense', 'tight', 'shared', 'short'] as const;
export type LeanPacking = (typeof LEAN_PACKINGS)[number];

export type LeanRefusal =
  | ReplacedRefusal
  /** dst is idx, and no other register is known to hold an address. */
  | 'no-register-for-address'
  /** A short jump does not reach what all blocks, or several, share. */
  | 'too-many-entries-for-short-jumps';

const ROOMY_STRIDE = 16;

/**
 * Lays out the handler of `load` that needs no stack: for every index k below `entries.length` it leaves the
 * registers, flags and RIP that the load would have left after reading `entries[k]`, and touches no memory.
 *
 * An index out of range leads anywhere: the caller has proven the bound. The load may be of one byte too, with the
 * table's bytes as entries.
 */
export function leanLayout(
  load: LoadSite,
  entries: ArrayLike<number>,
  packing: LeanPacking,
): HandlerLayout | Refused<LeanRefusal> {
  const replaced = replacedLoad(load, entries);
  if ('refused' in replaced) return replaced;
  const packed = pack(replaced, packing);
  return packed === undefined ? { refused: 'too-many-entries-for-short-jumps' } : detour(replaced, packed);
}

function pack(replaced: Replaced, packing: LeanPacking): Packing | undefined {
  switch (packing) {
    case 'roomy':
      return spaced(replaced, ROOMY_STRIDE);
    case 'dense':
      // 11 is no product of what one LEA can multiply by.
      return spaced(replaced, 10) ?? spaced(replaced, replaced.site.dst === replaced.site.idx ? 12 : 11);
    case 'tight':
      return tight(replaced);
    case 'shared':
      return shared(replaced, 5);
    case 'short':
      return shared(replaced, 2);
  }
}

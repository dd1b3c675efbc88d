import { detour } from './detour.js';
import { type Packing, roomy, shared, spaced, tight } from './packing.js';
import type { HandlerLayout, Refused } from './plan.js';
import { type LoadsRefusal, type Replaced, replacedLoads, type SwitchLoads } from './replaced.js';

/**
 * How the blocks stand: `roomy` 16 bytes apart, or a little more; `dense` without a gap, or nearly; `tight` 8 bytes
 * apart, with a short jump to a shared one; `shared`: jumps 5 bytes apart to blocks shared by entries that are alike;
 * `short`: the same with short jumps. The fastest first.
 */
export const LEAN_PACKINGS = ['roomy', 'dense', 'tight', 'shared', 'short'] as const;
export type LeanPacking = (typeof LEAN_PACKINGS)[number];

export type LeanRefusal =
  | LoadsRefusal
  /** dst is idx, and no other register is known to hold an address. */
  | 'no-register-for-address'
  /** A short jump does not reach what all blocks, or several, share. */
  | 'too-many-entries-for-short-jumps'
  /** More is to be done than a block has room for. */
  | 'does-not-fit';

/**
 * Lays out the handler of `loads` that needs no stack: for every index of the first one's table it leaves the registers,
 * flags and RIP that they would have left, and touches no memory.
 *
 * An index out of range leads anywhere: the caller has proven the bound. A load alone may be of bytes too, with these as
 * entries.
 */
export function leanLayout(loads: SwitchLoads, packing: LeanPacking): HandlerLayout | Refused<LeanRefusal> {
  const replaced = replacedLoads(loads);
  if ('refused' in replaced) return replaced;
  if (packing === 'tight' && replaced.outcomes[0]!.code.length > 1) return { refused: 'does-not-fit' };
  const packed = pack(replaced, packing);
  return packed === undefined ? { refused: 'too-many-entries-for-short-jumps' } : detour(replaced, packed);
}

function pack(replaced: Replaced, packing: LeanPacking): Packing | undefined {
  switch (packing) {
    case 'roomy':
      return roomy(replaced);
    case 'dense':
      // 11 is no product of what one LEA can multiply by.
      return (
        spaced(replaced, 10) ??
        spaced(replaced, replaced.site.dst === replaced.site.idx ? 12 : 11) ??
        roomy(replaced)
      );
    case 'tight':
      return tight(replaced);
    case 'shared':
      return shared(replaced, 5);
    case 'short':
      return shared(replaced, 2);
  }
}

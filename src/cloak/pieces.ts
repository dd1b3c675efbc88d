import { type Gpa, type Gva, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import type { Cloak } from './cloak-map.js';

/** A change of guest code: as many bytes before as after. */
export interface HiddenChange<Owner> {
  readonly gva: Gva;
  readonly original: Uint8Array;
  readonly current: Uint8Array;
  readonly owner: Owner;
}

/** The cloaks of a change, one per page: neighbouring pages may lie in frames that are no neighbours. */
export function cloaksOfChange<Owner>(
  { gva, original, current, owner }: HiddenChange<Owner>,
  translate: (gva: Gva) => Gpa,
): Cloak<Owner>[] {
  const cloaks: Cloak<Owner>[] = [];
  for (let from = 0; from < original.length; ) {
    const at = gva + BigInt(from);
    const to = Math.min(from + PAGE_SIZE - pageOffset(at), original.length);
    cloaks.push({
      gpa: translate(at),
      original: original.subarray(from, to),
      current: current.subarray(from, to),
      owner,
    });
    from = to;
  }
  return cloaks;
}

import { guardedDetour } from './detour.js';
import { packSwitch, type SwitchPacking, type SwitchRefusal } from './fused.js';
import type { HandlerLayout, Refused } from './plan.js';
import { replacedSwitch, type WholeSwitch } from './replaced.js';

/**
 * Lays out a handler like the fused one for a table whose end is not proven: the whole index is compared first, and one
 * beyond the entries that are known executes a copy of the first load, and goes on behind it.
 *
 * The flags need not be saved: on every way from here the switch's `add` overwrites those that the comparison changes.
 *
 * @param load the bytes of the first load
 */
export function guardedLayout(
  whole: WholeSwitch,
  load: Uint8Array,
  packing: SwitchPacking,
): HandlerLayout | Refused<SwitchRefusal> {
  const replaced = replacedSwitch(whole);
  if ('refused' in replaced) return replaced;
  const packed = packSwitch(replaced, packing);
  return packed === undefined ? { refused: 'does-not-fit' } : guardedDetour(replaced, packed, load);
}

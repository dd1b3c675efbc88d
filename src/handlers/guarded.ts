import { guardedDetour } from './detour.js';
import { loadEntry } from './encoding.js';
import { packSwitch, type SwitchPacking, type SwitchRefusal } from './fused.js';
import type { HandlerLayout, Refused } from './plan.js';
import { replacedSwitch, type WholeSwitch } from './replaced.js';

/**
 * Lays out a handler like the fused one for a table whose end is not proven: the whole index is compared first, and one
 * beyond the entries that are known executes a copy of the first load, and goes on behind it.
 *
 * The flags need not be saved: on every way from here the switch's `add` overwrites those that the comparison changes.
 *
 * @param table where the table of the first load begins, from the image base on
 */
export function guardedLayout(
  whole: WholeSwitch,
  table: number,
  packing: SwitchPacking,
): HandlerLayout | Refused<SwitchRefusal> {
  const replaced = replacedSwitch(whole);
  if ('refused' in replaced) return replaced;
  const packed = packSwitch(replaced, packing);
  const { dst, base, idx } = replaced.site;
  const load = loadEntry(dst, base, idx, whole.byteLoad === undefined ? 4 : 1, table);
  return packed === undefined ? { refused: 'does-not-fit' } : guardedDetour(replaced, packed, load);
}

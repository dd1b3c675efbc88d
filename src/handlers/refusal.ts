import { JUMP_LENGTH } from './jump.js';
import type { LoadSite } from './plan.js';

/** Why no handler can replace a load, whatever its layout. */
export type LoadRefusal =
  | 'site-too-short'
  | 'address-size-prefix'
  | 'destination-not-32-bit'
  | 'destination-is-rsp'
  | 'index-is-rsp'
  | 'base-is-rsp'
  | 'no-entries'
  | 'too-many-entries';

/** As many as the recogniser believes a table to have. */
export const MAX_ENTRIES = 8192;

/** @param most as many entries as a handler can have */
export function refusalOf(load: LoadSite, entries: number, most = MAX_ENTRIES): LoadRefusal | undefined {
  if (load.length < JUMP_LENGTH) return 'site-too-short';
  if (load.addressBits !== 64) return 'address-size-prefix';
  if (load.dstBits !== 32) return 'destination-not-32-bit';
  if (load.dst === 'rsp') return 'destination-is-rsp';
  if (load.idx === 'rsp') return 'index-is-rsp';
  // A table on the stack is not a switch table.
  if (load.base === 'rsp') return 'base-is-rsp';
  if (entries === 0) return 'no-entries';
  if (entries > most) return 'too-many-entries';
  return undefined;
}

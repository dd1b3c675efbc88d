import { JUMP_LENGTH } from './jump.js';
import type { TableLoad } from './plan.js';

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

export const MAX_ENTRIES = 256;

export function refusalOf(load: TableLoad, entries: number): LoadRefusal | undefined {
  if (load.length < JUMP_LENGTH) return 'site-too-short';
  if (load.addressBits !== 64) return 'address-size-prefix';
  if (load.dstBits !== 32) return 'destination-not-32-bit';
  if (load.dst === 'rsp') return 'destination-is-rsp';
  if (load.idx === 'rsp') return 'index-is-rsp';
  // A table on the stack is not a switch table.
  if (load.base === 'rsp') return 'base-is-rsp';
  if (entries === 0) return 'no-entries';
  if (entries > MAX_ENTRIES) return 'too-many-entries';
  return undefined;
}

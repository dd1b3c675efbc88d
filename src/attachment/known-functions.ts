import { parseHookName } from '../memtables/hook-name.js';
import { NT } from '../nt/kernel-image.js';
import type { Profile } from '../nt/profile.js';

/**
 * Checks, before anything is attached, what can be told then: that the names of functions to hook are names, and that
 * the profile knows those of NT.
 *
 * @throws MemtablesError `INVALID_ARGUMENT`, `SYMBOL_NOT_FOUND`
 */
export function assertFunctionsKnown(names: readonly string[], profile: Profile): void {
  for (const target of names.map(parseHookName)) {
    if (target.module.toLowerCase() === NT && 'symbol' in target) profile.symbol(target.symbol);
  }
}

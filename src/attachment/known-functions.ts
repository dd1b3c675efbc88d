import { symbolOfHook } from '../memtables/hook-name.js';
import type { Profile } from '../nt/profile.js';

/**
 * Checks, before anything is attached, that the profile knows the functions to hook.
 *
 * @param names as `nt!Name`
 * @throws MemtablesError `INVALID_ARGUMENT`, `SYMBOL_NOT_FOUND`
 */
export function assertFunctionsKnown(names: readonly string[], profile: Profile): void {
  for (const name of names) profile.symbol(symbolOfHook(name));
}

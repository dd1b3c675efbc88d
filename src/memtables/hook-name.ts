import { MemtablesError } from '../errors.js';

const MODULE_PREFIX = 'nt!';

/**
 * The symbol that a hook's name, `nt!Name`, stands for.
 *
 * @throws MemtablesError `INVALID_ARGUMENT` when it is no such name
 */
export function symbolOfHook(name: string): string {
  if (name.startsWith(MODULE_PREFIX) && name.length > MODULE_PREFIX.length)
    return name.slice(MODULE_PREFIX.length);
  throw new MemtablesError('INVALID_ARGUMENT', `'${name}' does not name a function of the kernel`, {
    remedy: 'Write nt!Name, with the name as the profile has it.',
    context: { name },
  });
}

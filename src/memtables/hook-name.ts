import { MemtablesError } from '../errors.js';

/** `module!Name`, or `module+0xRVA`. */
export const HOOK_NAME = /^(?:([^!]+)!(.+)|([^!]+)\+0x([0-9a-f]{1,8}))$/i;

export const HOOK_NAME_FORMS = 'Write nt!Name, module!Name, or module+0xRVA for a function without a name.';

/** A function to hook. */
export type HookTarget =
  | { readonly module: string; readonly symbol: string }
  | { readonly module: string; readonly rva: number };

/**
 * What a hook's name stands for.
 *
 * @throws MemtablesError `INVALID_ARGUMENT` when it is no such name
 */
export function parseHookName(name: string): HookTarget {
  const [, module, symbol, at, rva] = HOOK_NAME.exec(name) ?? [];
  if (module !== undefined && symbol !== undefined) return { module, symbol };
  if (at !== undefined && rva !== undefined) return { module: at, rva: Number.parseInt(rva, 16) };
  throw new MemtablesError('INVALID_ARGUMENT', `'${name}' does not name a function of the kernel`, {
    remedy: HOOK_NAME_FORMS,
    context: { name },
  });
}

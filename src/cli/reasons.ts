// What the words mean that say why something was left as it is; docs/refusals.md lists them.
import type { HandlerRefusal } from '../handlers/planner.js';
import type { HookRefusal } from '../memtables/hooks.js';
import type { Instability } from '../slack/regions.js';
import type { RefusalReason } from '../switches/table.js';

/** Why a table load is not known to be one that can be relocated: read off the image alone. */
export const LOAD_REFUSALS: Record<RefusalReason, string> = {
  'not-in-function': 'no code is known to run there',
  'function-too-complex': 'the function is too large to analyse',
  'indirect-jump-unresolved': 'another jump of the function may go anywhere',
  'not-a-table-load': 'no load of a table',
  'not-a-dword-load': 'entries are not 4 bytes',
  'address-size-prefix': 'the address has 32 bits',
  'scale-not-4': 'the index is not scaled by 4',
  'destination-not-32-bit': 'the load does not go to a register of 32 bits',
  'stack-pointer-as-destination': 'the load changes the stack pointer',
  'shorter-than-a-jump': 'the load is shorter than a jump',
  'not-a-switch': 'no jump follows',
  'base-not-proven': 'the base register may not hold the image base',
  'table-outside-image': 'the table is outside of the image',
  'table-not-in-executable-section': 'the table is not in code',
  'table-in-writable-section': 'the table may be written to',
  'bound-not-proven': 'it is not known where the table ends',
  'table-overlaps-code': 'the index reaches over the table, into code',
  'table-overlaps-table': 'the index reaches over the table, into another one',
  'entry-outside-image': 'an entry is outside of the image',
  'entry-not-executable': 'an entry is not in code',
  'entry-not-an-instruction': 'an entry is no instruction of the function',
  'byte-not-an-index': 'a byte leads to none of the known dwords',
  'several-switches': 'several switches use the same byte load',
};

const INSTABILITIES: Record<Instability, string> = {
  'not-executable': 'it lies in a section without code',
  writable: 'it lies in a section that may be written to',
  discardable: 'it lies in a section that Windows frees after the start',
  pageable: 'it lies in a section that Windows may page out',
  'initialisation-code': 'it lies in a section that Windows frees or overwrites after the start',
  'mapped-for-user-mode': 'it lies in the section that is mapped for user mode too',
};

const HANDLER_REFUSALS: Partial<Record<HandlerRefusal, string>> = {
  'too-many-entries': 'the table has more entries than a handler has blocks',
  'jump-out-of-range': 'the slack is more than 2 GB away',
  'register-not-in-frame':
    'a thread preempted in the handler could not get the register back that the load overwrites',
  'no-register-for-address': 'no register can hold an address',
  'not-adjacent': 'for the whole switch: other code stands between its instructions',
  'branch-target': 'for the whole switch: something branches to an instruction behind its first',
  'site-too-short-for-inline': 'with `--handler inline`: the computed jump is longer than the switch',
  'another-add': 'for the whole switch: what is added behind the load is not the image base to the entry',
  retpoline: 'for the whole switch: the kernel has replaced the jump by one that does not speculate',
};

/** Why a load is left alone in a running guest, besides `LOAD_REFUSALS`. */
export const RELOCATION_REFUSALS: Readonly<Record<string, string>> = {
  ...INSTABILITIES,
  ...HANDLER_REFUSALS,
  'outside-sections': 'it lies in no section of its image',
  'load-outside-kernel': 'the load is in no image of the kernel',
  'image-unreadable': 'the image of its module is damaged, or not in memory',
  'another-table-was-read': 'the load read another table than its code says',
  'code-has-changed': 'code or table are not what they were when the tool attached',
  'overlaps-hook': 'a hook has replaced the load',
  'no-slack': 'no slack is left for a handler',
  'in-use':
    'something stood among the instructions to be replaced at every try, and no handler fits that replaces the load alone',
  'only-other-load-relocated': 'of the two loads of its switch only the other one could be relocated',
  'overwritten-by-guest': 'the guest has written over it: taken back',
};

/** Why a function is not hooked. */
export const HOOK_REFUSALS: Readonly<Record<HookRefusal, string>> = {
  'too-short': 'the function, or its way to a return, is shorter than the jump that would replace its start',
  undecodable: 'some of its bytes are no instruction, so that its branches are not known',
  call: 'it calls another function in the bytes to replace, and would return into our code',
  branch: 'it branches, returns or raises an interrupt in the bytes to replace',
  'branch-target': 'it jumps back into the bytes to replace, or takes an address there',
  'eip-relative-operand': 'an operand in the bytes to replace can only be reached from where it is',
  'interrupt-shadow': 'the last instruction to move holds off interrupts for the next one',
  'fault-off-frame': 'an instruction to move may fault when the stack has changed',
  'jump-out-of-range': 'the slack is more than 2 GB away',
  'operand-out-of-range': 'an operand is more than 2 GB away from the slack',
  ...INSTABILITIES,
  'in-use': 'threads kept standing in its first instructions, or could not be looked at',
  'overlaps-relocation': 'a table load among its first instructions has been relocated',
  'hooked-already': 'it has a hook',
  'not-code': 'it lies in no section with code: it is data',
  'not-a-function-start': 'it lies inside a function',
  'too-large': 'it is larger than any function is expected to be',
  'not-in-memory': 'a part of it is not in memory',
  'image-unreadable': 'the image of its module is damaged, or not in memory',
  'image-has-changed': 'its module has been unloaded since, or loaded anew',
};

const TABLE_PREFIX = 'table-';

/** In words, why a load was left alone; `undefined` for a reason that is not known here. */
export function loadRefusal(reason: string): string | undefined {
  const own = wordsOf({ ...LOAD_REFUSALS, ...RELOCATION_REFUSALS }, reason);
  if (own !== undefined || !reason.startsWith(TABLE_PREFIX)) return own;
  const ofTable = wordsOf(RELOCATION_REFUSALS, reason.slice(TABLE_PREFIX.length));
  return ofTable && `of the table: ${ofTable}`;
}

/** In words, why a hook was refused; `undefined` for a reason that is not known here. */
export function hookRefusal(reason: unknown): string | undefined {
  return typeof reason === 'string' ? wordsOf(HOOK_REFUSALS, reason) : undefined;
}

function wordsOf(words: Readonly<Record<string, string>>, reason: string): string | undefined {
  return Object.hasOwn(words, reason) ? words[reason] : undefined;
}

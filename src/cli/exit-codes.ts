import type { ErrorCode } from '../errors.js';

/** What the process exits with; documented in `memtables --help` and the README. */
export const EXIT = {
  ok: 0,
  internal: 1,
  usage: 2,
  environment: 3,
  hypervisor: 4,
  guest: 5,
  refused: 6,
  unload: 7,
} as const;

/** By code, for `--help`. */
export const EXIT_MEANINGS: Readonly<Record<number, string>> = {
  [EXIT.ok]: 'done, and the guest is as it was found',
  [EXIT.internal]:
    'an error in memtables itself, or a demo, benchmark or rig that was stopped or did not show what it has to',
  [EXIT.usage]: 'a wrong argument, or a file that cannot be read or written',
  [EXIT.environment]: 'something is missing or in the way: set-up, library, socket, journal, hypervisor',
  [EXIT.hypervisor]:
    'the hypervisor failed, went away or got stuck; a journal that is left lists what is in the guest',
  [EXIT.guest]: 'the guest, its kernel image or the profile is not one we can work with',
  [EXIT.refused]:
    'a change was refused (a hook that cannot be placed, no slack left); nothing was left behind',
  [EXIT.unload]:
    'the guest may still hold changes: unload blocked or cut short, or undo failed; see the journal',
};

export const EXIT_CODE_HELP = [
  '',
  'Exit codes:',
  ...Object.entries(EXIT_MEANINGS).map(([code, meaning]) => `  ${code}  ${meaning}`),
].join('\n');

const BY_CODE: Record<ErrorCode, number> = {
  INVALID_ARGUMENT: EXIT.usage,
  FILE_UNREADABLE: EXIT.usage,
  SETUP_INCOMPLETE: EXIT.environment,
  LIBRARY_NOT_LOADED: EXIT.environment,
  LIBRARY_INCOMPATIBLE: EXIT.environment,
  ATTACH_FAILED: EXIT.environment,
  NOT_ATTACHED: EXIT.internal,
  HYPERVISOR_FAILED: EXIT.hypervisor,
  HYPERVISOR_GONE: EXIT.hypervisor,
  HYPERVISOR_STUCK: EXIT.hypervisor,
  NOT_QUIESCENT: EXIT.hypervisor,
  GUEST_UNSUPPORTED: EXIT.guest,
  GUEST_MEMORY_UNMAPPED: EXIT.guest,
  GUEST_STRUCTURE_INVALID: EXIT.guest,
  KERNEL_NOT_FOUND: EXIT.guest,
  IMAGE_INVALID: EXIT.guest,
  PROFILE_INVALID: EXIT.guest,
  PROFILE_MISMATCH: EXIT.guest,
  SYMBOL_NOT_FOUND: EXIT.guest,
  SLACK_EXHAUSTED: EXIT.refused,
  HOOK_REFUSED: EXIT.refused,
  JOURNAL_FAILED: EXIT.environment,
  UNLOAD_BLOCKED: EXIT.unload,
  ROLLBACK_FAILED: EXIT.unload,
  DEMO_FAILED: EXIT.internal,
  BENCH_FAILED: EXIT.internal,
  RIG_FAILED: EXIT.internal,
  MACHINE_FAILED: EXIT.hypervisor,
  PROTOCOL_VIOLATION: EXIT.hypervisor,
};

export function exitCodeOf(code: ErrorCode): number {
  return BY_CODE[code];
}

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

export const EXIT_CODE_HELP = `
Exit codes:
  0  done, and the guest is as it was found
  1  an error in memtables itself
  2  a wrong argument, or a file that cannot be read
  3  something is missing: set-up, library, socket, hypervisor
  4  the hypervisor failed, went away or got stuck
  5  the guest, its kernel image or the profile is not one we can work with
  6  a change was refused (a hook that cannot be placed, no slack left); nothing was left behind
  7  the guest may still hold changes: unload blocked or undo failed; see the journal
`;

const BY_CODE: Record<ErrorCode, number> = {
  INVALID_ARGUMENT: EXIT.usage,
  FILE_UNREADABLE: EXIT.usage,
  SETUP_INCOMPLETE: EXIT.environment,
  LIBRARY_NOT_LOADED: EXIT.environment,
  LIBRARY_INCOMPATIBLE: EXIT.environment,
  ATTACH_FAILED: EXIT.environment,
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
  SITE_CHANGED: EXIT.refused,
  JOURNAL_FAILED: EXIT.environment,
  UNLOAD_BLOCKED: EXIT.unload,
  ROLLBACK_FAILED: EXIT.unload,
  DEMO_FAILED: EXIT.internal,
  MACHINE_FAILED: EXIT.hypervisor,
  PROTOCOL_VIOLATION: EXIT.hypervisor,
};

export function exitCodeOf(code: ErrorCode): number {
  return BY_CODE[code];
}

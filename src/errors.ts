/**
 * The one family of errors this project throws.
 *
 * `code` is stable and machine readable, the message says what happened, `remedy` what a person can do
 * about it, and `context` carries the values (addresses as `bigint`) that were looked at.
 */
export type ErrorCode =
  // what the user asked for
  | 'INVALID_ARGUMENT'
  | 'FILE_UNREADABLE'
  // what has to be there
  | 'SETUP_INCOMPLETE'
  | 'LIBRARY_NOT_LOADED'
  | 'LIBRARY_INCOMPATIBLE'
  | 'ATTACH_FAILED'
  // asked of an attachment that has been unloaded
  | 'NOT_ATTACHED'
  // the hypervisor
  | 'HYPERVISOR_FAILED'
  | 'HYPERVISOR_GONE'
  | 'HYPERVISOR_STUCK'
  | 'NOT_QUIESCENT'
  // the guest
  | 'GUEST_UNSUPPORTED'
  | 'GUEST_MEMORY_UNMAPPED'
  | 'GUEST_STRUCTURE_INVALID'
  | 'KERNEL_NOT_FOUND'
  | 'IMAGE_INVALID'
  | 'PROFILE_INVALID'
  | 'PROFILE_MISMATCH'
  | 'SYMBOL_NOT_FOUND'
  // changing the guest
  | 'SLACK_EXHAUSTED'
  | 'HOOK_REFUSED'
  | 'JOURNAL_FAILED'
  | 'UNLOAD_BLOCKED'
  | 'ROLLBACK_FAILED'
  // the demo, the benchmark, the rig with Xen
  | 'DEMO_FAILED'
  | 'BENCH_FAILED'
  | 'RIG_FAILED'
  // the embedded machine
  | 'MACHINE_FAILED'
  | 'PROTOCOL_VIOLATION';

/** Values a person needs to act; addresses as `bigint`, they print as hexadecimal. */
export type ErrorContext = Readonly<Record<string, unknown>>;

export interface ErrorDetails {
  /** What a person can do about it: one sentence, imperative. */
  readonly remedy: string;
  readonly context?: ErrorContext;
  readonly cause?: unknown;
}

export class MemtablesError extends Error {
  override readonly name = 'MemtablesError';
  readonly code: ErrorCode;
  readonly remedy: string;
  readonly context: ErrorContext;

  constructor(code: ErrorCode, message: string, details: ErrorDetails) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.code = code;
    this.remedy = details.remedy;
    this.context = details.context ?? {};
  }
}

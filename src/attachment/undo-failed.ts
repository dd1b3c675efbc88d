import { type ErrorCode, MemtablesError } from '../errors.js';

const GONE: readonly (ErrorCode | undefined)[] = ['HYPERVISOR_GONE', 'HYPERVISOR_STUCK'];
/** These say themselves that changes may be left in the guest. */
const TELLING: readonly (ErrorCode | undefined)[] = [...GONE, 'UNLOAD_BLOCKED', 'ROLLBACK_FAILED'];

/**
 * What to tell the user when `first` had failed and then `failure` kept its changes from being undone: that they may
 * still be in the guest, because of `first`. When it had failed because the hypervisor is gone, that says it all.
 */
export function undoFailed(failure: unknown, first: unknown): unknown {
  const code = codeOf(failure);
  if (GONE.includes(code) && codeOf(first)?.startsWith('HYPERVISOR_')) return first;
  if (failure instanceof MemtablesError && TELLING.includes(code)) {
    const { message, remedy, context } = failure;
    return new MemtablesError(failure.code, message, { remedy, context, cause: first });
  }
  return new MemtablesError('ROLLBACK_FAILED', 'what is in the guest could not be taken back', {
    remedy: 'The journal names the bytes to put back; restart the guest if nothing else can.',
    context: { why: failure instanceof Error ? failure.message : String(failure) },
    cause: first,
  });
}

function codeOf(error: unknown): ErrorCode | undefined {
  return error instanceof MemtablesError ? error.code : undefined;
}

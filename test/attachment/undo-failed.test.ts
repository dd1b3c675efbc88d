import { describe, expect, test } from 'vitest';
import { undoFailed } from '../../src/attachment/undo-failed.js';
import { type ErrorCode, MemtablesError } from '../../src/errors.js';

const error = (code: ErrorCode) =>
  new MemtablesError(code, code.toLowerCase(), { remedy: 'x', context: { at: 1n } });

describe('an error that is followed by one of undoing', () => {
  test.each(['UNLOAD_BLOCKED', 'ROLLBACK_FAILED', 'HYPERVISOR_GONE', 'HYPERVISOR_STUCK'] as const)(
    'a refusal, then %s: what may be left in the guest counts',
    (code) => {
      const first = error('HOOK_REFUSED');
      const failure = error(code);
      const { message, remedy, context } = failure;
      expect(undoFailed(failure, first)).toMatchObject({ code, message, remedy, context, cause: first });
    },
  );

  test.each([error('HYPERVISOR_FAILED'), error('JOURNAL_FAILED'), new TypeError('x is undefined'), 'text'])(
    'a refusal, then %s: changes are left',
    (failure) => {
      const first = error('HOOK_REFUSED');
      const why = failure instanceof Error ? failure.message : failure;
      expect(undoFailed(failure, first)).toMatchObject({
        code: 'ROLLBACK_FAILED',
        cause: first,
        context: { why },
      });
    },
  );

  test('a hypervisor that failed and then is gone says it all', () => {
    const first = error('HYPERVISOR_FAILED');
    expect(undoFailed(error('HYPERVISOR_GONE'), first)).toBe(first);
    expect(undoFailed(error('HYPERVISOR_STUCK'), error('HYPERVISOR_GONE'))).toMatchObject({
      code: 'HYPERVISOR_GONE',
    });
  });

  test('the first may be no error of ours', () => {
    const first = new TypeError('x is undefined');
    expect(undoFailed(error('HYPERVISOR_GONE'), first)).toMatchObject({
      code: 'HYPERVISOR_GONE',
      cause: first,
    });
  });
});

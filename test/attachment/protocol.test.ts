import { describe, expect, test } from 'vitest';
import { fromPortable, toPortable } from '../../src/attachment/protocol.js';
import { MemtablesError } from '../../src/errors.js';

/** As a message to another thread. */
const cross = (error: unknown): Error => fromPortable(structuredClone(toPortable(error)));

describe('an error that crosses to another thread', () => {
  test('keeps its class, code, remedy, context, stack and cause', () => {
    const error = new MemtablesError('HOOK_REFUSED', 'no', {
      remedy: 'Hook another.',
      context: { at: 0xfffff80000001000n, bytes: Uint8Array.of(1) },
      cause: new MemtablesError('JOURNAL_FAILED', 'deep', { remedy: 'x', cause: new Error('deeper') }),
    });
    const arrived = cross(error);
    expect(arrived).toBeInstanceOf(MemtablesError);
    const { code, message, remedy, context, stack, cause } = error;
    expect(arrived).toMatchObject({ code, message, remedy, context, stack });
    expect(arrived.cause).toMatchObject({ code: 'JOURNAL_FAILED', message: (cause as Error).message });
    expect((arrived.cause as Error).cause).toMatchObject({ message: 'deeper' });
  });

  test('without a cause has none', () => {
    expect(cross(new MemtablesError('HOOK_REFUSED', 'no', { remedy: 'x' })).cause).toBeUndefined();
  });

  test('of another class stays one: it is not ours', () => {
    const arrived = cross(new TypeError('x is not a function'));
    expect(arrived).not.toBeInstanceOf(MemtablesError);
    expect(arrived.message).toBe('x is not a function');
    expect(arrived.stack).toContain('TypeError');
  });

  test('that is no error at all is told by its text', () => {
    expect(cross('plain').message).toBe('plain');
  });

  test('with a context that cannot be cloned still arrives', () => {
    const error = new MemtablesError('HOOK_REFUSED', 'no', { remedy: 'x', context: { call: () => 1 } });
    expect(cross(error)).toMatchObject({ code: 'HOOK_REFUSED', message: 'no' });
  });
});

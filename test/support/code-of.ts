import type { MemtablesError } from '../../src/errors.js';

/** The code of the error that an action throws; its text where it has none. */
export function codeOf(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    return (error as MemtablesError).code ?? String(error);
  }
  return 'nothing thrown';
}

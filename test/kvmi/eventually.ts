import { expect } from 'vitest';

const PATIENCE_MS = 20_000;

/** Waits for what another process brings about, however busy the machine is. */
export function eventually<T>(read: () => T) {
  return expect.poll(read, { timeout: PATIENCE_MS });
}

import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    // A whole guest boots in some tests; none asserts on time.
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // One guest already keeps a core busy.
    maxWorkers: 2,
    minWorkers: 1,
  },
});

import { dirname, resolve } from 'node:path';
import { defineConfig } from 'vitest/config';

// The loader reads the variable when a process starts: the workers, and the programs that they start, inherit it.
const libvmi = process.env.MEMTABLES_TEST_LIBVMI;
if (libvmi) {
  const before = process.env.LD_LIBRARY_PATH;
  const folders = [resolve('build/Release/libvirt-stub'), dirname(resolve(libvmi))];
  process.env.LD_LIBRARY_PATH = [...folders, ...(before ? [before] : [])].join(':');
}

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    globalSetup: ['test/support/announce-skips.ts'],
    // A whole guest boots in some tests; none asserts on time.
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // One guest already keeps a core busy.
    maxWorkers: 2,
    minWorkers: 1,
  },
});

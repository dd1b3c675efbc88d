import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const bundled = fileURLToPath(new URL('../../build/Release/kvmi.so', import.meta.url));
const real = process.env.MEMTABLES_TEST_LIBVMI;

/** The libraries with libvmi's C ABI that the suite runs on. */
export const LIBRARIES: readonly { readonly library: string; readonly path: string }[] = [
  ...(existsSync(bundled) ? [{ library: 'the bundled library', path: bundled }] : []),
  ...(real ? [{ library: 'libvmi itself', path: resolve(real) }] : []),
];

/** How many vCPUs a guest has where that may make a difference. */
export const VCPU_COUNTS = [1, 2, 3, 5, 8] as const;

import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const bundled = fileURLToPath(new URL('../../build/Release/kvmi.so', import.meta.url));
const real = process.env.MEMTABLES_TEST_LIBVMI;

if (real === undefined) {
  // biome-ignore lint/suspicious/noConsole: a skip has to be seen
  console.warn('SKIPPED: "libvmi itself" needs MEMTABLES_TEST_LIBVMI, and LD_LIBRARY_PATH for its libkvmi');
}

/** The libraries with libvmi's C ABI that the suite runs on. */
export const LIBRARIES: readonly { readonly library: string; readonly path: string }[] = [
  ...(existsSync(bundled) ? [{ library: 'the bundled library', path: bundled }] : []),
  ...(real === undefined ? [] : [{ library: 'libvmi itself', path: real }]),
];

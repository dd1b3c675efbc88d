import { existsSync } from 'node:fs';

// Runs once, before the first test: a skip has to be seen, and once is enough.
export function setup(): void {
  const skipped = [
    !process.env.MEMTABLES_TEST_LIBVMI &&
      '"libvmi itself" needs MEMTABLES_TEST_LIBVMI, or npm run test:libvmi -- --libvmi PATH',
    !existsSync('.deps/binaries/OpenConsole.exe') &&
      '"real binaries" (their switches, bounds and handlers) need npm run binaries',
  ];
  // biome-ignore lint/suspicious/noConsole: a skip has to be seen
  for (const what of skipped) if (what) console.warn(`SKIPPED: ${what}`);
}

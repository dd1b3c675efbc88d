// Runs once, before the first test: a skip has to be seen, and once is enough.
export function setup(): void {
  if (process.env.MEMTABLES_TEST_LIBVMI) return;
  // biome-ignore lint/suspicious/noConsole: a skip has to be seen
  console.warn(
    'SKIPPED: "libvmi itself" needs MEMTABLES_TEST_LIBVMI, or npm run test:libvmi -- --libvmi PATH',
  );
}

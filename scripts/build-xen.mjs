// Builds libvmi's C ABI over Xen's own libraries: `node scripts/build-xen.mjs PREFIX LIBRARY`, where PREFIX is the folder
// that Debian's libxen-dev was unpacked to, or / where it is installed.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync } from 'node:fs';
import { dirname, join } from 'node:path';

const [prefix, library] = process.argv.slice(2);
const isInstalled = prefix === '/';
const libraries = join(prefix, 'usr/lib/x86_64-linux-gnu');

function sourcesIn(folder) {
  return readdirSync(folder)
    .filter((name) => name.endsWith('.cc'))
    .map((name) => join(folder, name));
}

// What is installed the compiler finds by itself.
function whereUnpacked() {
  if (isInstalled) return [];
  return ['-isystem', join(prefix, 'usr/include'), `-L${libraries}`, `-Wl,-rpath-link,${libraries}`];
}

/** libxen-dev has the headers, and links to libraries that are in other packages. */
function missingLibraries() {
  if (isInstalled) return [];
  if (!existsSync(libraries)) return [libraries];
  const links = readdirSync(libraries).filter((name) =>
    /^libxen(call|ctrl|devicemodel|evtchn|foreignmemory|store|toolcore|toollog)\.so$/.test(name),
  );
  return links.map((name) => join(libraries, name)).filter((path) => !existsSync(path));
}

const missing = missingLibraries();
if (missing.length > 0) {
  process.stderr.write(
    `what these lead to is missing: ${missing.join(', ')}\nunpack the packages that libxen-dev depends on, too\n`,
  );
  process.exit(1);
}
mkdirSync(dirname(library), { recursive: true });
const { status, error } = spawnSync(
  'c++',
  [
    // Xen's headers need GNU's extensions.
    ...['-std=gnu++17', '-O2', '-Wall', '-Wextra', '-fPIC', '-fvisibility=hidden'],
    ...['-shared', '-Wl,-z,defs', '-I', 'native/vmi/include', ...whereUnpacked()],
    ...['native/vmi', 'native/xen'].flatMap(sourcesIn),
    ...['-lxenctrl', '-lxenforeignmemory', '-lxenevtchn', '-lxenstore', '-o', library],
  ],
  { stdio: ['ignore', 2, 2] },
);
if (error) throw error;
process.exitCode = status ?? 1;

// Brings a fresh checkout to where it can run: packages, Unicorn, native code, the guest, TypeScript.
// A step is skipped when nothing it depends on has changed since it last succeeded.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
process.chdir(root);

const UNICORN = {
  requirement: 'unicorn==2.1.4',
  // manylinux x86-64 wheel
  sha256: '9d6e6dea140560de4ebd8446661f7ef84a357d428c14a3ef09dacd306ec8c239',
};
const DEPS = '.deps';
const STAMPS = join(DEPS, 'stamps.json');

class SetupError extends Error {}

function say(message) {
  process.stderr.write(`setup: ${message}\n`);
}

function filesBelow(path) {
  if (!existsSync(path)) return [];
  if (statSync(path).isFile()) return [path];
  return readdirSync(path, { withFileTypes: true })
    .flatMap((entry) => filesBelow(join(path, entry.name)))
    .sort();
}

function digest(inputs, salt) {
  const hash = createHash('sha256').update(salt);
  for (const file of inputs.flatMap(filesBelow)) hash.update(file).update('\0').update(readFileSync(file));
  return hash.digest('hex');
}

function loadStamps() {
  try {
    return JSON.parse(readFileSync(STAMPS, 'utf8'));
  } catch {
    return {};
  }
}

function saveStamps(stamps) {
  writeFileSync(STAMPS, `${JSON.stringify(stamps, null, 2)}\n`);
}

function has(command, args = ['--version']) {
  return spawnSync(command, args, { stdio: 'ignore' }).status === 0;
}

// stdout is left to the command that follows the set-up.
function run(command, args, remedy = 'see what it printed above') {
  const { status, error } = spawnSync(command, args, { stdio: ['ignore', 2, 2] });
  if (error) throw new SetupError(`${command} could not be started: ${error.message}`);
  if (status !== 0) throw new SetupError(`'${command} ${args.join(' ')}' failed: ${remedy}`);
}

/** Everything that is missing on this machine, with what to do about it. */
function missingThings() {
  const missing = [];
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major < 20 || (major === 20 && minor < 19)) {
    missing.push(`Node 20.19 or later is needed, this is ${process.versions.node}: get one from nodejs.org`);
  }
  if (process.platform !== 'linux' || process.arch !== 'x64') {
    missing.push(`Linux on x86-64 is needed, this is ${process.platform} on ${process.arch}`);
  }
  if (!has('npm')) missing.push('npm is missing: install it (it comes with Node from nodejs.org)');
  if (!has('python3')) {
    missing.push('python3 is missing: install Python 3 (Debian: apt-get install python3 python3-pip)');
  } else if (!has('python3', ['-m', 'pip', '--version'])) {
    missing.push('pip is missing: install it for python3 (Debian: apt-get install python3-pip)');
  }
  for (const [tool, what] of [
    ['c++', 'a C++ compiler'],
    ['make', 'make'],
  ]) {
    if (!has(tool))
      missing.push(`${what} (${tool}) is missing: install it (Debian: apt-get install build-essential)`);
  }
  if (!has(ASSEMBLER) && !mayInstall()) {
    missing.push(
      `the guest's assembler (${ASSEMBLER}) is missing: install binutils for x86_64-w64-mingw32 ` +
        '(Debian, as root: apt-get install binutils-mingw-w64-x86-64)',
    );
  }
  return missing;
}

function checkMachine() {
  const missing = missingThings();
  if (missing.length > 0) throw new SetupError(missing.join('\nsetup: error: '));
}

function installPackages() {
  run(
    'npm',
    ['ci', '--no-audit', '--no-fund', '--ignore-scripts'],
    'check that the npm registry can be reached (npm ping; behind a proxy: npm config set proxy URL)',
  );
}

function installUnicorn() {
  const wheels = join(DEPS, 'wheels');
  const target = join(DEPS, 'unicorn');
  mkdirSync(wheels, { recursive: true });
  const requirements = join(wheels, 'requirements.txt');
  writeFileSync(requirements, `${UNICORN.requirement} --hash=sha256:${UNICORN.sha256}\n`);
  run(
    'python3',
    [
      ...['-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:', '--require-hashes'],
      ...['-r', requirements, '-d', wheels],
    ],
    'check that PyPI can be reached (behind a proxy: set HTTPS_PROXY), and that pip is 19.3 or later',
  );
  const wheel = readdirSync(wheels).find((name) => name.endsWith('.whl'));
  rmSync(target, { recursive: true, force: true });
  run('python3', ['-m', 'zipfile', '-e', join(wheels, wheel), target]);
}

const ASSEMBLER = 'x86_64-w64-mingw32-as';

function mayInstall() {
  return process.getuid() === 0 && has('apt-get');
}

function installGuestAssembler() {
  if (has(ASSEMBLER)) return;
  const name = 'binutils-mingw-w64-x86-64';
  say(`installing ${name} (3 MB) with apt-get`);
  const install = () =>
    spawnSync('apt-get', ['install', '-y', '-q', name], { stdio: ['ignore', 2, 2] }).status === 0;
  if (install()) return;
  // The package lists may be missing or old.
  const remedy = `check that the Debian mirror can be reached, or install ${name} by hand`;
  run('apt-get', ['update', '-q'], remedy);
  if (!install()) throw new SetupError(`apt-get could not install ${name}: ${remedy}`);
}

function buildNative() {
  const args = ['node_modules/node-gyp/bin/node-gyp.js', 'configure', 'build', '--loglevel', 'warn'];
  // Node's own headers, where the installation carries them: no download then.
  const prefix = dirname(dirname(process.execPath));
  if (!process.env.npm_config_nodedir && existsSync(join(prefix, 'include/node/node_api.h')))
    args.push('--nodedir', prefix);
  run(
    process.execPath,
    args,
    "see the compiler's message above; where it could not fetch Node's headers, name a Node installation that has them: npm_config_nodedir=DIR",
  );
}

/** Where Debian's libxen-dev lies: unpacked below a folder that was named, or installed. */
const XEN_PREFIXES = [process.env.MEMTABLES_XEN_PREFIX, '/'].filter(Boolean);
const XEN_PREFIX = XEN_PREFIXES.find((prefix) => existsSync(join(prefix, 'usr/include/xenctrl.h')));
const HAS_XEN = XEN_PREFIX !== undefined;
const XEN_LIBRARY = 'build/Release/xen.so';
const GET_XEN = 'Debian: apt-get install libxen-dev; what to unpack instead, docs/xen-library.md says';

function buildForXen() {
  run(
    process.execPath,
    ['scripts/build-xen.mjs', XEN_PREFIX, XEN_LIBRARY],
    `see the compiler's message above; Xen's headers and libraries are needed below ${XEN_PREFIX} (${GET_XEN})`,
  );
}

function withoutXen() {
  return existsSync(XEN_LIBRARY)
    ? 'the library for Xen stays as it was built: libxen-dev is not to be found now'
    : `no library for Xen: libxen-dev is missing (${GET_XEN})`;
}

function buildGuest() {
  run(process.execPath, ['scripts/build-guest.mjs', 'build/guest']);
}

/** The guest can do without it. Tried once, and not for minutes: who has no network now is not kept waiting for it. */
function fetchGuestModule() {
  const { status } = spawnSync(process.execPath, ['scripts/fetch-binaries.mjs', 'tree-sitter-c'], {
    stdio: ['ignore', 2, 2],
    env: { ...process.env, npm_config_fetch_retries: '0', npm_config_fetch_timeout: '30000' },
  });
  if (status !== 0) say('the guest runs without real code; `npm run binaries` fetches it later');
}

function buildTypeScript() {
  rmSync('dist', { recursive: true, force: true });
  run(process.execPath, ['node_modules/typescript/bin/tsc', '-p', 'tsconfig.build.json']);
}

const steps = [
  {
    name: 'packages',
    what: 'installing npm packages (150 MB on disk)',
    inputs: ['package-lock.json'],
    outputs: ['node_modules/.package-lock.json'],
    run: installPackages,
  },
  {
    name: 'unicorn',
    what: 'fetching Unicorn 2.1.4 (16 MB)',
    inputs: [],
    salt: UNICORN.sha256,
    outputs: [join(DEPS, 'unicorn/unicorn/lib/libunicorn.so.2')],
    run: installUnicorn,
  },
  {
    name: 'native',
    what: 'building the native parts (about a minute)',
    inputs: [
      'binding.gyp',
      'native/machine',
      'native/vmi',
      'native/kvmi',
      'native/libvirt-stub',
      'native/handlers',
    ],
    salt: process.versions.modules,
    outputs: [
      'build/Release/machine.node',
      'build/Release/kvmi.so',
      'build/Release/kvmi-bare-listener',
      'build/Release/handlers-run-code',
      'build/Release/abi-check',
      'build/Release/libvirt-stub/libvirt.so',
    ],
    run: buildNative,
  },
  {
    name: 'xen',
    what: HAS_XEN ? 'building the library for Xen (about 10 s)' : withoutXen(),
    // The header changes with each version of Xen, on which an older build cannot be loaded.
    inputs: HAS_XEN
      ? ['native/xen', 'native/vmi', 'scripts/build-xen.mjs', join(XEN_PREFIX, 'usr/include/xenctrl.h')]
      : [],
    salt: HAS_XEN ? XEN_PREFIX : 'none',
    outputs: HAS_XEN ? [XEN_LIBRARY] : [],
    run: HAS_XEN ? buildForXen : undefined,
  },
  {
    name: 'guest',
    what: 'building the guest kernel',
    inputs: ['native/guest', 'scripts/build-guest.mjs'],
    outputs: [
      'build/guest/ntoskrnl.exe',
      'build/guest/hal.dll',
      'build/guest/pvh/hal.dll',
      'build/guest/pvh/start.bin',
      'build/guest/pvh/watched.bin',
      'build/guest/ntoskrnl.json',
      'build/guest/sites.json',
    ],
    run: () => {
      installGuestAssembler();
      buildGuest();
    },
  },
  {
    name: 'module',
    what: 'fetching real code for the guest to run (1 MB)',
    inputs: ['scripts/fetch-binaries.mjs'],
    outputs: [],
    run: fetchGuestModule,
  },
  {
    name: 'typescript',
    what: 'compiling TypeScript',
    inputs: ['src', 'tsconfig.json', 'tsconfig.build.json'],
    outputs: ['dist/cli/main.js'],
    run: buildTypeScript,
  },
];

function main() {
  checkMachine();
  mkdirSync(DEPS, { recursive: true });
  const stamps = loadStamps();
  for (const step of steps) {
    const stamp = digest(step.inputs, step.salt ?? '');
    if (stamps[step.name] === stamp && step.outputs.every(existsSync)) continue;
    say(step.what);
    const started = Date.now();
    // Until it has succeeded again, what the last success left behind does not count.
    saveStamps({ ...stamps, [step.name]: undefined });
    step.run?.();
    stamps[step.name] = stamp;
    saveStamps(stamps);
    if (step.run) say(`${step.name} done in ${((Date.now() - started) / 1000).toFixed(1)} s`);
  }
}

try {
  main();
} catch (error) {
  if (!(error instanceof SetupError)) throw error;
  say(`error: ${error.message}`);
  process.exitCode = 1;
}

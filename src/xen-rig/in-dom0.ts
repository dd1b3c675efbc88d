// Runs in dom0: creates the guest's domain, does the main job on it, and reports line by line.
import { setTimeout as sleep } from 'node:timers/promises';
import { toPortable } from '../attachment/protocol.js';
import { inMilliseconds } from '../cli/describe.js';
import { describedProgress, describeSummary } from '../cli/describe-main-job.js';
import { toJson } from '../cli/to-json.js';
import { runMainJob } from '../demo/main-job.js';
import type { Relocated } from '../demo/verdict.js';
import { MemtablesError } from '../errors.js';
import { readGuestArtefacts } from '../guest/artefacts.js';
import { pvhKernel } from '../guest/pvh.js';
import { runChecks } from './checks/run.js';
import { createDomain } from './domain.js';
import { DomainMemory } from './domain-memory.js';
import { type Dom0Job, type Dom0Line, REQUIRED_FORMS } from './report.js';
import { XenBed } from './xen-bed.js';

const NAME = 'guest';
const FOLDER = '/run';
const BOOT_SECONDS = 30;
const POLL_MS = 100;
/** Where reads of its bytes trap, the guest's integrity checker needs this long for a sweep. */
const MOST_EXTRA_SECONDS = 300;

function report(line: Dom0Line): void {
  process.stdout.write(`${toJson(line)}\n`);
}

function stage(text: string): void {
  report({ type: 'stage', text });
}

async function main(job: Dom0Job): Promise<readonly string[]> {
  const { seed, vcpus, memoryMB, seconds, hooks, library, threshold } = job;
  const artefacts = readGuestArtefacts();
  const { image, pvh } = artefacts;
  const { elf, guest } = pvhKernel({ image, ...pvh, seed, vcpus, memoryMB, simpleReads: true });
  const domain = createDomain({ name: NAME, kernel: elf, vcpus, memoryMB }, FOLDER);
  stage('domain created');
  const bed = new XenBed(NAME, new DomainMemory(domain), guest, artefacts);
  await until(() => bed.hasBooted);
  stage('guest booted');

  const progress = describedProgress(
    seconds,
    (record, text) => report({ type: 'result', record, ...(text !== undefined && { text }) }),
    stage,
  );
  const { summary, relocated, shortcomings } = await runMainJob(
    bed,
    artefacts,
    {
      seconds,
      mostExtraSeconds: MOST_EXTRA_SECONDS,
      hooks,
      handler: 'auto',
      library,
      threshold,
      enoughOfEachForm: 1,
    },
    progress,
    new AbortController().signal,
  );
  const record = { vcpus, seed, ...summary, unload: inMilliseconds(summary.unload) };
  report({ type: 'result', record: { type: 'summary', ...record }, text: describeSummary(summary) });
  return [...shortcomings, ...formShortcomings(relocated)];
}

async function until(condition: () => boolean): Promise<void> {
  const end = performance.now() + BOOT_SECONDS * 1000;
  while (!condition()) {
    if (performance.now() > end) {
      throw new MemtablesError('MACHINE_FAILED', 'the guest did not boot in time', {
        remedy: "Look at the rig's console log for what it printed.",
        context: { seconds: BOOT_SECONDS },
      });
    }
    await sleep(POLL_MS);
  }
}

function formShortcomings(relocated: readonly Relocated[]): string[] {
  return REQUIRED_FORMS.filter((form) => !relocated.some((event) => event.form === form)).map(
    (form) => `no ${form} switch was relocated`,
  );
}

try {
  const job: Dom0Job = JSON.parse(process.argv[2]!);
  const shortcomings = job.conformance ? await runChecks(job.library, FOLDER, report) : await main(job);
  report({ type: 'judged', shortcomings });
} catch (error) {
  report({ type: 'error', error: toPortable(error) });
}
// A call that never returns would keep the process alive, and the machine on.
process.exit();

import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { assertFunctionsKnown } from '../attachment/known-functions.js';
import { MemtablesError } from '../errors.js';
import { readGuestArtefacts } from '../guest/artefacts.js';
import { loadProfile } from '../nt/profile.js';
import type { Bed } from './bed.js';
import { EmbeddedHost } from './embedded-host.js';
import { type MainJobOptions, type MainJobProgress, type MainJobSummary, runMainJob } from './main-job.js';
import { speedShortcomings } from './verdict.js';

export interface DemoOptions extends Omit<MainJobOptions, 'mostExtraSeconds' | 'threshold'> {
  readonly vcpus: number;
  readonly seed: number;
}

export interface DemoSummary extends MainJobSummary {
  readonly vcpus: number;
  readonly seed: number;
}

export interface DemoResult {
  readonly summary: DemoSummary;
  /** What the run had to show and did not. */
  readonly shortcomings: readonly string[];
}

const GUEST_NAME = 'embedded';
/** On a busy machine. */
const MAX_EXTRA_SECONDS = 60;

/**
 * The main job on an embedded host. The host is gone when it ends, also when it fails.
 *
 * @throws MemtablesError of whatever failed; the reason of `signal`
 */
export async function runDemo(
  { vcpus, seed, ...options }: DemoOptions,
  progress: MainJobProgress,
  signal: AbortSignal,
): Promise<DemoResult> {
  const artefacts = readGuestArtefacts();
  assertFunctionsKnown(options.hooks ?? [], loadProfile(artefacts.profilePath));
  const directory = mkdtempSync(join(tmpdir(), 'memtables-'));
  try {
    const socket = join(directory, 'kvmi');
    const host = await EmbeddedHost.start(socket, vcpus, seed, signal);
    const bed: Bed = {
      target: { name: GUEST_NAME, socket },
      statistics: () => host.statistics(),
      image: () => host.image(),
    };
    try {
      const job = { ...options, mostExtraSeconds: MAX_EXTRA_SECONDS };
      const { summary, relocated, shortcomings } = await runMainJob(bed, artefacts, job, progress, signal);
      // Which tables hooks of the user's own choice put on trapped pages is not for us to say.
      const judgesSpeed = options.handler === 'auto' && options.hooks === undefined;
      return {
        summary: { vcpus, seed, ...summary },
        shortcomings: [
          ...shortcomings,
          ...(judgesSpeed ? speedShortcomings(summary.phases, relocated.length) : []),
        ],
      };
    } finally {
      await host.stop();
    }
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/** The error for a run that fell short. */
export function demoFailed(seed: number, failures: readonly string[]): MemtablesError {
  return new MemtablesError('DEMO_FAILED', `the demo did not show what it has to: ${failures.join('; ')}`, {
    remedy: `Run it again with --seed ${seed} and more --seconds; if it fails again, report it.`,
    context: { seed },
  });
}

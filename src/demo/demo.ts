import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Attachment } from '../attachment/attachment.js';
import { MemtablesError } from '../errors.js';
import { type GuestArtefacts, readGuestArtefacts } from '../guest/artefacts.js';
import { predictChecksum } from '../guest/workload-model.js';
import type { HostStatistics } from '../host/statistics-client.js';
import type { EngineEvent, Statistics, UnloadReport } from '../memtables/report.js';
import { EmbeddedHost } from './embedded-host.js';
import { type Phase, phaseBetween, sum } from './phase.js';
import { type GuestVerdict, type Relocated, shortcomings } from './verdict.js';

export interface DemoOptions {
  readonly vcpus: number;
  /** Length of each phase. */
  readonly seconds: number;
  readonly seed: number;
  /** Functions to hook, as `nt!Name`; those that put most tables on trapped pages without it. */
  readonly hooks: readonly string[] | undefined;
  /** A library with libvmi's C ABI; the bundled one without it. */
  readonly library: string | undefined;
}

export type PhaseName = 'unhooked' | 'hooked' | 'relocated';

export interface DemoSummary {
  readonly vcpus: number;
  readonly seed: number;
  readonly hooks: number;
  readonly phases: Readonly<Record<PhaseName, Phase>>;
  readonly relocations: number;
  readonly refused: Statistics['refused'];
  /** Counted by the host. */
  readonly staleEvents: number;
  readonly cloakedReads: Statistics['cloakedReads'];
  readonly unload: UnloadReport;
  readonly guest: GuestVerdict;
}

export interface DemoProgress {
  event(event: EngineEvent): void;
  phaseBegins(name: PhaseName): void;
  phaseEnded(name: PhaseName, phase: Phase): void;
}

export interface DemoResult {
  readonly summary: DemoSummary;
  /** What the run had to show and did not. */
  readonly shortcomings: readonly string[];
}

const GUEST_NAME = 'embedded';

/**
 * The main job on an embedded host: three phases of equal length, an unload, and the proof that the guest
 * never noticed.
 *
 * @throws MemtablesError of whatever failed
 */
export async function runDemo(options: DemoOptions, progress: DemoProgress): Promise<DemoResult> {
  const artefacts = readGuestArtefacts();
  const directory = mkdtempSync(join(tmpdir(), 'memtables-'));
  try {
    const socket = join(directory, 'kvmi');
    const host = await EmbeddedHost.start(socket, options.vcpus, options.seed);
    try {
      return await measure(options, progress, artefacts, socket, host);
    } finally {
      host.stop();
    }
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

async function measure(
  options: DemoOptions,
  progress: DemoProgress,
  artefacts: GuestArtefacts,
  socket: string,
  host: EmbeddedHost,
): Promise<DemoResult> {
  const imageBefore = await host.image();
  const attachment = await Attachment.open({
    name: GUEST_NAME,
    socket,
    profile: artefacts.profilePath,
    relocate: false,
    ...(options.library === undefined ? {} : { library: options.library }),
  });
  const relocated: Relocated[] = [];
  attachment.on('event', (event) => {
    if (event.type === 'relocated') relocated.push(event);
    progress.event(event);
  });
  const phase = async (name: PhaseName): Promise<Phase> => {
    progress.phaseBegins(name);
    const from = await host.statistics();
    await Promise.race([sleep(options.seconds * 1000), attachment.ended]);
    const result = phaseBetween(from, await host.statistics());
    progress.phaseEnded(name, result);
    return result;
  };

  const hooks = options.hooks ?? artefacts.sites.defaultHooks.map((name) => `nt!${name}`);
  const unhooked = await phase('unhooked');
  for (const name of hooks) await attachment.hook(name);
  const hooked = await phase('hooked');
  await attachment.setRelocation(true);
  const phases = { unhooked, hooked, relocated: await phase('relocated') };
  const atEnd = await host.statistics();
  const engine = await attachment.statistics();
  const unload = await attachment.unload();

  const afterUnload = await host.statistics();
  const guest: GuestVerdict = {
    checksumOk: checksumsAreRight(artefacts, afterUnload),
    integritySweeps: afterUnload.guest?.integritySweeps ?? 0,
    integrityMismatches: afterUnload.guest?.integrityMismatches ?? 0,
    identicalAfterUnload: imageBefore.equals(await host.image()),
  };
  const summary: DemoSummary = {
    vcpus: options.vcpus,
    seed: options.seed,
    hooks: hooks.length,
    phases,
    relocations: engine.relocations,
    refused: engine.refused,
    staleEvents: sum(afterUnload.violations.sites.map(({ stale }) => stale)),
    cloakedReads: engine.cloakedReads,
    unload,
    guest,
  };
  return { summary, shortcomings: shortcomings(phases, guest, relocated, atEnd) };
}

/** Whether every stream of the workload computed what the model computes. */
function checksumsAreRight({ sites }: GuestArtefacts, { guest }: HostStatistics): boolean {
  if (guest === undefined || guest.bugCheck !== undefined || guest.streams.length === 0) return false;
  return guest.streams.every(({ form, seed, count, checksum }) => {
    return predictChecksum(sites.calls, form, seed, BigInt(count)) === checksum;
  });
}

/** The error for a run that fell short. */
export function demoFailed(seed: number, failures: readonly string[]): MemtablesError {
  return new MemtablesError('DEMO_FAILED', `the demo did not show what it has to: ${failures.join('; ')}`, {
    remedy: `Run it again with --seed ${seed} and more --seconds; if it fails again, report it.`,
    context: { seed },
  });
}

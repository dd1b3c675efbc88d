import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Attachment } from '../attachment/attachment.js';
import { assertFunctionsKnown } from '../attachment/known-functions.js';
import { MemtablesError } from '../errors.js';
import { type GuestArtefacts, readGuestArtefacts } from '../guest/artefacts.js';
import { predictChecksum } from '../guest/workload-model.js';
import type { Encoder, HandlerChoice } from '../handlers/planner.js';
import type { HostStatistics } from '../host/statistics-client.js';
import type { EngineEvent, Statistics, UnloadReport } from '../memtables/report.js';
import { loadProfile } from '../nt/profile.js';
import { EmbeddedHost } from './embedded-host.js';
import { fullPieces, fullSweeps, type Phase, phaseBetween, secondsBetween, sum } from './phase.js';
import { unlessAborted } from './unless-aborted.js';
import {
  type Decided,
  type GuestVerdict,
  guestShortcomings,
  judgeSites,
  lateViolations,
  lexerShortcomings,
  type Relocated,
  type SiteCounts,
  speedShortcomings,
} from './verdict.js';

export interface DemoOptions {
  readonly vcpus: number;
  /** Length of each phase. */
  readonly seconds: number;
  readonly seed: number;
  /** Functions to hook, as `nt!Name`; those that put most tables on trapped pages without it. */
  readonly hooks: readonly string[] | undefined;
  readonly handler: HandlerChoice;
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
  /** The relocations by what laid their handlers out. */
  readonly encoders: Readonly<Partial<Record<Encoder, number>>>;
  readonly sites: SiteCounts;
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
  /** Its time is over, but the guest's integrity checker has not been through once, or its lexer not read a piece. */
  phaseGoesOn(name: PhaseName): void;
  phaseEnded(name: PhaseName, phase: Phase): void;
}

export interface DemoResult {
  readonly summary: DemoSummary;
  /** What the run had to show and did not. */
  readonly shortcomings: readonly string[];
}

const GUEST_NAME = 'embedded';
/** A phase lasts longer, up to this, where the guest has not shown yet what it has to: on a busy machine. */
const MAX_EXTRA_SECONDS = 60;
const POLL_MS = 50;

/**
 * The main job on an embedded host: three phases of equal length, an unload, and the proof that the guest
 * never noticed. The host is gone when it ends, also when it fails.
 *
 * @throws MemtablesError of whatever failed; the reason of `signal`
 */
export async function runDemo(
  options: DemoOptions,
  progress: DemoProgress,
  signal: AbortSignal,
): Promise<DemoResult> {
  const artefacts = readGuestArtefacts();
  assertFunctionsKnown(options.hooks ?? [], loadProfile(artefacts.profilePath));
  const directory = mkdtempSync(join(tmpdir(), 'memtables-'));
  try {
    const socket = join(directory, 'kvmi');
    const host = await EmbeddedHost.start(socket, options.vcpus, options.seed, signal);
    try {
      return await attachAndMeasure(options, progress, artefacts, socket, host, signal);
    } finally {
      await host.stop();
    }
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

async function attachAndMeasure(
  options: DemoOptions,
  progress: DemoProgress,
  artefacts: GuestArtefacts,
  socket: string,
  host: EmbeddedHost,
  signal: AbortSignal,
): Promise<DemoResult> {
  const imageBefore = await host.image();
  const attachment = await Attachment.open({
    name: GUEST_NAME,
    socket,
    profile: artefacts.profilePath,
    relocate: false,
    handler: options.handler,
    signal,
    ...(options.library === undefined ? {} : { library: options.library }),
  });
  try {
    return await unlessAborted(
      signal,
      measure(options, progress, artefacts, host, attachment, imageBefore, signal),
    );
  } finally {
    // Whatever has failed, the guest gets its bytes back; after a good run that has been done. One that does not ends
    // with the demo.
    await attachment.unload().catch(() => {});
  }
}

async function measure(
  options: DemoOptions,
  progress: DemoProgress,
  artefacts: GuestArtefacts,
  host: EmbeddedHost,
  attachment: Attachment,
  imageBefore: Buffer,
  signal: AbortSignal,
): Promise<DemoResult> {
  const relocated: Relocated[] = [];
  const decided: Decided[] = [];
  attachment.on('event', (event) => {
    if (event.type === 'relocated') relocated.push(event);
    if (event.type === 'relocated' || event.type === 'refused') decided.push(event);
    progress.event(event);
  });
  const phase = async (name: PhaseName): Promise<MeasuredPhase> => {
    progress.phaseBegins(name);
    const from = await host.statistics();
    await unlessEnded(attachment, options.seconds * 1000, signal);
    let to = await host.statistics();
    const longest = options.seconds + MAX_EXTRA_SECONDS;
    const isThrough = () => hasShownItself(from, to, artefacts.module !== undefined);
    if (!isThrough()) progress.phaseGoesOn(name);
    for (; !isThrough() && secondsBetween(from, to) < longest; to = await host.statistics()) {
      await unlessEnded(attachment, POLL_MS, signal);
    }
    const result = phaseBetween(from, to);
    progress.phaseEnded(name, result);
    return { result, from, to };
  };

  const hooks = options.hooks ?? defaultHooks(artefacts);
  const unhooked = await phase('unhooked');
  for (const name of hooks) await attachment.hook(name);
  const hooked = await phase('hooked');
  await attachment.setRelocation(true);
  const relocatedBefore = relocated.length;
  const last = await phase('relocated');
  const engine = await attachment.statistics();
  const unload = await attachment.unload();

  const afterUnload = await host.statistics();
  const guest: GuestVerdict = {
    checksumOk: checksumsAreRight(artefacts, afterUnload),
    integritySweeps: afterUnload.guest?.integritySweeps ?? 0,
    integrityMismatches: afterUnload.guest?.integrityMismatches ?? 0,
    identicalAfterUnload: imageBefore.equals(await host.image()),
    ...(afterUnload.guest?.lexer && { lexer: afterUnload.guest.lexer }),
  };
  const phases = { unhooked: unhooked.result, hooked: hooked.result, relocated: last.result };
  const sites = judgeSites(artefacts.sites.sites, attachment.kernel.base, decided);
  const summary: DemoSummary = {
    vcpus: options.vcpus,
    seed: options.seed,
    hooks: hooks.length,
    phases,
    relocations: engine.relocations,
    encoders: countEncoders(relocated),
    sites: sites.counts,
    refused: engine.refused,
    staleEvents: sum(afterUnload.violations.sites.map(({ stale }) => stale)),
    cloakedReads: engine.cloakedReads,
    unload,
    guest,
  };
  const found = [
    ...guestShortcomings(phases, guest),
    ...(artefacts.module ? lexerShortcomings(phases, guest) : []),
    ...lateViolations({
      before: relocated.slice(0, relocatedBefore),
      during: relocated.slice(relocatedBefore),
      from: last.from.violations,
      to: last.to.violations,
      end: afterUnload.violations,
    }),
    // One encoder alone cannot do every switch, or has not slack enough; and which tables hooks of the user's own choice
    // put on trapped pages is not for us to say.
    ...(options.handler === 'auto' ? sites.shortcomings : []),
    ...(options.handler === 'auto' && options.hooks === undefined
      ? speedShortcomings(phases, relocated.length)
      : []),
  ];
  return { summary, shortcomings: found };
}

/** Whether the guest has looked at itself in a phase, and its lexer at some text of which it knows what is in it. */
function hasShownItself(from: HostStatistics, to: HostStatistics, hasModule: boolean): boolean {
  if (fullSweeps(from, to) === 0) return false;
  return !hasModule || (fullPieces(from, to) > 0 && (to.guest?.lexer?.passes ?? 0) > 0);
}

/** Those that put most tables on trapped pages. */
function defaultHooks({ sites, module }: GuestArtefacts): string[] {
  return [...sites.defaultHooks.map((name) => `nt!${name}`), ...(module?.defaultHooks ?? [])];
}

function countEncoders(relocated: readonly Relocated[]): DemoSummary['encoders'] {
  const counts: Partial<Record<Encoder, number>> = {};
  for (const { encoder } of relocated) counts[encoder] = (counts[encoder] ?? 0) + 1;
  return counts;
}

interface MeasuredPhase {
  readonly result: Phase;
  /** The host as it was when the phase began and ended. */
  readonly from: HostStatistics;
  readonly to: HostStatistics;
}

/** Waits, unless the attachment ends meanwhile: by an error then, which is thrown. */
async function unlessEnded(attachment: Attachment, ms: number, signal: AbortSignal): Promise<void> {
  const over = new AbortController();
  try {
    const waiting = sleep(ms, undefined, { signal: AbortSignal.any([signal, over.signal]) });
    await Promise.race([waiting, attachment.ended]);
  } finally {
    over.abort();
  }
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

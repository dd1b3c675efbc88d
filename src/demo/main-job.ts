import { setTimeout as sleep } from 'node:timers/promises';
import { Attachment } from '../attachment/attachment.js';
import type { GuestArtefacts } from '../guest/artefacts.js';
import { predictChecksum } from '../guest/workload-model.js';
import type { Encoder, HandlerChoice } from '../handlers/planner.js';
import type { EngineEvent, Statistics, UnloadReport } from '../memtables/report.js';
import type { Bed, BedStatistics } from './bed.js';
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
} from './verdict.js';

export interface MainJobOptions {
  /** Length of each phase. */
  readonly seconds: number;
  /** A phase lasts longer, by up to this, where the guest has not shown yet what it has to. */
  readonly mostExtraSeconds: number;
  /** Functions to hook, as `nt!Name`; those that put most tables on trapped pages without it. */
  readonly hooks: readonly string[] | undefined;
  readonly handler: HandlerChoice;
  /** A library with libvmi's C ABI; the bundled one without it. */
  readonly library: string | undefined;
  /** As `AttachOptions` has it. */
  readonly threshold?: number;
  /** Relocates no more once there are so many switches of each form; all that become hot without it. */
  readonly enoughOfEachForm?: number;
}

export type PhaseName = 'unhooked' | 'hooked' | 'relocated';

export interface MainJobSummary {
  readonly hooks: number;
  readonly phases: Readonly<Record<PhaseName, Phase>>;
  readonly relocations: number;
  /** The relocations by what laid their handlers out. */
  readonly encoders: Readonly<Partial<Record<Encoder, number>>>;
  readonly sites: SiteCounts;
  readonly refused: Statistics['refused'];
  /** Counted by the bed. */
  readonly staleEvents: number;
  readonly cloakedReads: Statistics['cloakedReads'];
  readonly unload: UnloadReport;
  readonly guest: GuestVerdict;
}

export interface MainJobProgress {
  event(event: EngineEvent): void;
  phaseBegins(name: PhaseName): void;
  /** What is hot is relocated before the phase that measures the guest with it. */
  relocatingBegins(): void;
  /** Its time is over, but the guest's integrity checker has not been through once, or its lexer not read a piece. */
  phaseGoesOn(name: PhaseName): void;
  phaseEnded(name: PhaseName, phase: Phase): void;
}

export interface MainJobResult {
  readonly summary: MainJobSummary;
  readonly relocated: readonly Relocated[];
  /** What the run had to show and did not. */
  readonly shortcomings: readonly string[];
}

const POLL_MS = 250;
/** As long as nothing has been relocated or refused, what was hot has been dealt with. */
const SETTLED_MS = 1000;
const MOST_SETTLING_MS = 10_000;

/**
 * The main job: three phases of equal length, an unload, and the proof that the guest never noticed.
 *
 * @throws MemtablesError of whatever failed; the reason of `signal`
 */
export async function runMainJob(
  bed: Bed,
  artefacts: GuestArtefacts,
  options: MainJobOptions,
  progress: MainJobProgress,
  signal: AbortSignal,
): Promise<MainJobResult> {
  const imageBefore = await bed.image();
  const { handler, library, threshold } = options;
  const attachment = await Attachment.open({
    ...bed.target,
    profile: artefacts.profilePath,
    relocate: false,
    handler,
    signal,
    ...(library !== undefined && { library }),
    ...(threshold !== undefined && { threshold }),
  });
  try {
    return await unlessAborted(
      signal,
      measure(options, progress, artefacts, bed, attachment, imageBefore, signal),
    );
  } finally {
    // Whatever has failed, the guest gets its bytes back; after a good run that has been done. One that does not ends
    // with its bed.
    await attachment.unload().catch(() => {});
  }
}

async function measure(
  options: MainJobOptions,
  progress: MainJobProgress,
  artefacts: GuestArtefacts,
  bed: Bed,
  attachment: Attachment,
  imageBefore: Buffer,
  signal: AbortSignal,
): Promise<MainJobResult> {
  const relocated: Relocated[] = [];
  const decided: Decided[] = [];
  attachment.on('event', (event) => {
    if (event.type === 'relocated') {
      relocated.push(event);
      // One that has ended meanwhile says so by `ended`.
      if (hasEnough(relocated, options.enoughOfEachForm)) attachment.setRelocation(false).catch(() => {});
    }
    if (event.type === 'relocated' || event.type === 'refused') decided.push(event);
    progress.event(event);
  });
  const phase = async (name: PhaseName): Promise<MeasuredPhase> => {
    progress.phaseBegins(name);
    const from = await bed.statistics(attachment);
    await unlessEnded(attachment, options.seconds * 1000, signal);
    let to = await bed.statistics(attachment);
    const longest = options.seconds + options.mostExtraSeconds;
    const isThrough = () => hasShownItself(from, to, artefacts.module !== undefined);
    if (!isThrough()) progress.phaseGoesOn(name);
    for (; !isThrough() && secondsBetween(from, to) < longest; to = await bed.statistics(attachment)) {
      await unlessEnded(attachment, POLL_MS, signal);
    }
    const result = phaseBetween(from, to);
    progress.phaseEnded(name, result);
    return { result, from, to };
  };

  const settle = async () => {
    progress.relocatingBegins();
    for (let waited = 0; waited < MOST_SETTLING_MS; waited += SETTLED_MS) {
      const count = decided.length;
      await unlessEnded(attachment, SETTLED_MS, signal);
      if (decided.length === count) return;
    }
  };

  const hooks = options.hooks ?? defaultHooks(artefacts);
  const unhooked = await phase('unhooked');
  for (const name of hooks) await attachment.hook(name);
  const hooked = await phase('hooked');
  await attachment.setRelocation(true);
  await settle();
  const relocatedBefore = relocated.length;
  const last = await phase('relocated');
  const engine = await attachment.statistics();
  const unload = await attachment.unload();

  const afterUnload = await bed.statistics(attachment);
  const guest: GuestVerdict = {
    checksumOk: checksumsAreRight(artefacts, afterUnload),
    integritySweeps: afterUnload.guest?.integritySweeps ?? 0,
    integrityMismatches: afterUnload.guest?.integrityMismatches ?? 0,
    identicalAfterUnload: imageBefore.equals(await bed.image()),
    ...(afterUnload.guest?.lexer && { lexer: afterUnload.guest.lexer }),
  };
  const phases = { unhooked: unhooked.result, hooked: hooked.result, relocated: last.result };
  const sites = judgeSites(artefacts.sites.sites, attachment.kernel.base, decided);
  const summary: MainJobSummary = {
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
  ];
  return { summary, relocated, shortcomings: found };
}

/** Whether the guest has looked at itself in a phase, and its lexer at some text of which it knows what is in it. */
function hasShownItself(from: BedStatistics, to: BedStatistics, hasModule: boolean): boolean {
  if (fullSweeps(from, to) === 0) return false;
  return !hasModule || (fullPieces(from, to) > 0 && (to.guest?.lexer?.passes ?? 0) > 0);
}

/** Those that put most tables on trapped pages. */
function defaultHooks({ sites, module }: GuestArtefacts): string[] {
  return [...sites.defaultHooks.map((name) => `nt!${name}`), ...(module?.defaultHooks ?? [])];
}

/** The most frequent first. */
function countEncoders(relocated: readonly Relocated[]): MainJobSummary['encoders'] {
  const counts: Partial<Record<Encoder, number>> = {};
  for (const { encoder } of relocated) counts[encoder] = (counts[encoder] ?? 0) + 1;
  return Object.fromEntries(Object.entries(counts).sort(([, left], [, right]) => right - left));
}

interface MeasuredPhase {
  readonly result: Phase;
  /** The bed as it was when the phase began and ended. */
  readonly from: BedStatistics;
  readonly to: BedStatistics;
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
function checksumsAreRight({ sites }: GuestArtefacts, { guest }: BedStatistics): boolean {
  if (guest === undefined || guest.bugCheck !== undefined || guest.streams.length === 0) return false;
  return guest.streams.every(({ form, seed, count, checksum }) => {
    return predictChecksum(sites.calls, form, seed, BigInt(count)) === checksum;
  });
}

function hasEnough(relocated: readonly Relocated[], enough: number | undefined): boolean {
  if (enough === undefined) return false;
  const count = (form: Relocated['form']) => relocated.filter((each) => each.form === form).length;
  return count('one-level') >= enough && count('two-level') >= enough;
}

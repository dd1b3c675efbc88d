import type { SwitchSite } from '../guest/artefacts.js';
import type { EngineEvent } from '../memtables/report.js';
import { type Gva, hex } from '../vmi/address.js';
import type { BedStatistics } from './bed.js';
import { type Phase, rate } from './phase.js';

export type Relocated = Extract<EngineEvent, { type: 'relocated' }>;

export interface GuestVerdict {
  readonly checksumOk: boolean;
  readonly integritySweeps: number;
  readonly integrityMismatches: number;
  readonly identicalAfterUnload: boolean;
  /** Absent where the guest has no module. */
  readonly lexer?: NonNullable<BedStatistics['guest']>['lexer'];
}

/** More threads than the guest has. */
const MOST_THREADS = 64;

/** How much faster switches must be once they are relocated. */
const REQUIRED_SPEEDUP = 20;

type Phases = Readonly<Record<'unhooked' | 'hooked' | 'relocated', Phase>>;

/** What the guest should have shown and did not; empty for a good run. */
export function guestShortcomings(phases: Phases, guest: GuestVerdict): string[] {
  const found: string[] = [];
  if (!guest.checksumOk) found.push("the guest's checksums are not what its workload computes");
  if (guest.integrityMismatches > 0) {
    found.push(`the guest's integrity checker saw ${guest.integrityMismatches} changed bytes`);
  }
  if (!guest.identicalAfterUnload) found.push('the kernel image differs after unload');
  for (const [name, phase] of Object.entries(phases)) {
    if (phase.integritySweeps < 1) found.push(`no full integrity sweep in the ${name} phase`);
  }
  return found;
}

/** What the lexer of the guest's module should have shown: the same tokens in every phase. */
export function lexerShortcomings(phases: Phases, { lexer }: GuestVerdict): string[] {
  const found: string[] = [];
  if (lexer !== undefined && lexer.mismatches > 0) {
    found.push(
      `the guest's lexer found other tokens than at first in ${lexer.mismatches} pieces of its text`,
    );
  }
  for (const [name, phase] of Object.entries(phases)) {
    if (phase.lexerPieces < 1) found.push(`the guest's lexer read no piece of its text in the ${name} phase`);
  }
  return found;
}

/** What the default hooks should have made slow, and the relocations fast again. */
export function speedShortcomings(phases: Phases, relocations: number): string[] {
  const found: string[] = [];
  if (relocations === 0) found.push('no load was relocated');
  for (const form of ['one-level', 'two-level'] as const) {
    const speedup = rate(phases.relocated, form) / rate(phases.hooked, form);
    if (!(speedup >= REQUIRED_SPEEDUP)) {
      found.push(
        `${form} switches became ${speedup.toFixed(1)} times as fast, not ${REQUIRED_SPEEDUP} times`,
      );
    }
  }
  return found;
}

/** What became of the kernel's switches that the guest lists as such. */
export interface SiteCounts {
  readonly listed: number;
  readonly relocated: number;
  /** They have not trapped often enough, or not at all. */
  readonly undecided: number;
}

export type Decided = Extract<EngineEvent, { type: 'relocated' | 'refused' }>;

/** Compares what the tool did with the loads of the kernel at `base` with the guest's own list of them. */
export function judgeSites(
  sites: readonly SwitchSite[],
  base: Gva,
  decided: readonly Decided[],
): { readonly counts: SiteCounts; readonly shortcomings: string[] } {
  const byLoad = new Map<Gva, SwitchSite>();
  for (const site of sites) {
    for (const rva of [site.loadRva, site.byteLoadRva]) {
      if (rva !== undefined) byLoad.set(base + BigInt(rva), site);
    }
  }
  const relocated = new Set<string>();
  const left = new Set<string>();
  const shortcomings: string[] = [];
  for (const event of decided) {
    if (event.module !== undefined) continue;
    const site = byLoad.get(event.site);
    const isSwitch = site?.expected === 'relocatable';
    if (event.type === 'relocated') {
      if (isSwitch) relocated.add(site.name);
      else
        shortcomings.push(
          `${site?.name ?? hex(event.site)} was relocated, and is none of the guest's switches`,
        );
    } else if (isSwitch) {
      left.add(site.name);
      shortcomings.push(`${site.name} was left alone: ${event.reason}`);
    }
  }
  const listed = sites.filter(({ expected }) => expected === 'relocatable').length;
  const decidedSites = new Set([...relocated, ...left]).size;
  return {
    counts: { listed, relocated: relocated.size, undecided: listed - decidedSites },
    shortcomings,
  };
}

type Violations = BedStatistics['violations'];

export interface RelocatedPhase {
  /** Switches relocated before the phase began. */
  readonly before: readonly Relocated[];
  /** Switches relocated since, up to the unload. */
  readonly during: readonly Relocated[];
  /** What the host had counted when the phase began, when it ended, and after the unload. */
  readonly from: Violations;
  readonly to: Violations;
  readonly end: Violations;
}

/**
 * The relocated loads that still trapped, by a violation that was not under way when they were relocated.
 *
 * The host counts a violation when it is raised, and as stale when it is answered, which may be after the phase: stale
 * ones are therefore taken from the last look. Of a load that was relocated before the phase, the host's counts alone
 * decide. Of a load that became hot in the phase, every violation up to its relocation, at which none was
 * outstanding, is one of the engine's hits. To a load that follows another one a thread may still have been on its way.
 */
export function lateViolations({ before, during, from, to, end }: RelocatedPhase): string[] {
  const raisedBefore = (rip: string) => violationsAt(from, rip) - staleAt(from, rip);
  return [
    ...loadsOf(before).map((load) => ({ ...load, allowed: raisedBefore(load.rip) })),
    ...loadsOf(during).map((load) => ({ ...load, allowed: load.hits })),
  ].flatMap(({ rip, allowed, stragglers }) => {
    const late = violationsAt(to, rip) - staleAt(end, rip) - allowed - stragglers;
    const name = to.sites.find((site) => site.rip === rip)?.site;
    return late > 0 ? [`${name} was still trapped ${late} times after it had been relocated`] : [];
  });
}

function loadsOf(relocated: readonly Relocated[]) {
  return relocated.flatMap(({ loads }) =>
    loads.map(({ site, hits, stillReached }) => ({
      rip: hex(site),
      hits,
      stragglers: stillReached ? MOST_THREADS : 0,
    })),
  );
}

function violationsAt({ sites }: Violations, rip: string): number {
  return sites.find((site) => site.rip === rip)?.violations ?? 0;
}

function staleAt({ sites }: Violations, rip: string): number {
  return sites.find((site) => site.rip === rip)?.stale ?? 0;
}

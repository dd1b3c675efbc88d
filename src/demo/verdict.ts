import type { HostStatistics } from '../host/statistics-client.js';
import type { EngineEvent } from '../memtables/report.js';
import { hex } from '../vmi/address.js';
import { type Phase, rate } from './phase.js';

export type Relocated = Extract<EngineEvent, { type: 'relocated' }>;

export interface GuestVerdict {
  readonly checksumOk: boolean;
  readonly integritySweeps: number;
  readonly integrityMismatches: number;
  readonly identicalAfterUnload: boolean;
}

/** How much faster one-level switches must be once they are relocated. */
const REQUIRED_SPEEDUP = 20;

/** What a run had to show and did not; empty for a good one. */
export function shortcomings(
  phases: Readonly<Record<'unhooked' | 'hooked' | 'relocated', Phase>>,
  guest: GuestVerdict,
  relocated: readonly Relocated[],
  host: HostStatistics,
): string[] {
  const found: string[] = [];
  if (!guest.checksumOk) found.push("the guest's checksums are not what its workload computes");
  if (guest.integrityMismatches > 0) {
    found.push(`the guest's integrity checker saw ${guest.integrityMismatches} changed bytes`);
  }
  if (!guest.identicalAfterUnload) found.push('the kernel image differs after unload');
  for (const [name, phase] of Object.entries(phases)) {
    if (phase.integritySweeps < 1) found.push(`no full integrity sweep in the ${name} phase`);
  }
  if (relocated.length === 0) found.push('no load was relocated');
  const speedup = rate(phases.relocated, 'one-level') / rate(phases.hooked, 'one-level');
  if (!(speedup >= REQUIRED_SPEEDUP)) {
    found.push(
      `one-level switches became ${speedup.toFixed(1)} times as fast, not ${REQUIRED_SPEEDUP} times`,
    );
  }
  return [...found, ...lateViolations(relocated, host)];
}

/**
 * Every violation of a site was counted by the engine before it relocated the site; the host has counted
 * the same number, plus only those that it knows were under way just then.
 */
function lateViolations(relocated: readonly Relocated[], host: HostStatistics): string[] {
  const byRip = new Map(host.violations.sites.map((site) => [site.rip, site]));
  return relocated.flatMap(({ site: rip, form, hits }) => {
    const site = byRip.get(hex(rip));
    if (form !== 'one-level' || site === undefined) return [];
    const late = site.violations - site.stale - hits;
    return late > 0 ? [`${site.site} was still trapped ${late} times after it had been relocated`] : [];
  });
}

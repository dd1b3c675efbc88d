import type { Kernel } from '../nt/kernel.js';
import { type Finding, type LiveRange, type ScanResult, scanGuest } from '../safety/scan.js';
import { hex } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';

/** How many places a message names. */
const MAX_PLACES = 5;

/** What keeps code from being changed or taken out now. */
export type Obstacles = Pick<ScanResult, 'findings' | 'unsettled'>;

/** What stands inside of instructions that are to be replaced. They hold no call: nothing but a RIP leads into them. */
export function occupantsOf(hypervisor: Hypervisor, kernel: Kernel, ranges: readonly LiveRange[]): Obstacles {
  const { findings, unsettled } = scanGuest(hypervisor, kernel, ranges);
  return { findings: findings.filter(({ isRip }) => isRip), unsettled };
}

/** For a person: where live pointers are, and what could not be looked at. */
export function describeObstacles({ findings, unsettled }: Obstacles): string[] {
  const places = [...findings.map(describeFinding), ...unsettled];
  const more = places.length - MAX_PLACES;
  return more > 0 ? [...places.slice(0, MAX_PLACES), `and ${more} more`] : places;
}

function describeFinding({ kind, value, range, vcpu, thread }: Finding): string {
  if (kind === 'vcpu-rip') return `${hex(value)} (${range.owner}) is the RIP of vCPU ${vcpu}`;
  const holder =
    vcpu === undefined ? `thread ${thread === undefined ? '?' : hex(thread.gva)}` : `vCPU ${vcpu}`;
  return `${hex(value)} (${range.owner}) in the ${kind.replace('-', ' ')} of ${holder}`;
}

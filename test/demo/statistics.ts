import type { SwitchForm } from '../../src/guest/artefacts.js';
import type { HostStatistics } from '../../src/host/statistics-client.js';

type Site = HostStatistics['violations']['sites'][number];

export interface Counts {
  readonly uptimeMs?: number;
  readonly switches?: Partial<Record<SwitchForm, number>>;
  readonly sweeps?: number;
  readonly sites?: readonly Partial<Site>[];
}

/** What a host would have answered. */
export function hostStatistics({
  uptimeMs = 0,
  switches = {},
  sweeps = 0,
  sites = [],
}: Counts): HostStatistics {
  return {
    uptimeMs,
    vcpus: 2,
    seed: 1,
    kernelBase: '0xfffff80000000000',
    attached: true,
    outstandingEvents: 0,
    paused: [false, false],
    restrictedFrames: 0,
    violations: {
      read: 0,
      write: 0,
      execute: 0,
      otherReads: 0,
      stale: 0,
      substituted: {},
      sites: sites.map((site) => ({
        site: 'NtSomething',
        form: 'one-level',
        load: 'dword',
        expected: 'relocatable',
        rip: '0xfffff80000001000',
        violations: 0,
        stale: 0,
        ...site,
      })),
    },
    pageFaults: { answered: 0, turnaroundNs: 0, followed: 0, hostNs: 0 },
    guest: {
      switches: { 'one-level': 0, 'two-level': 0, 'look-alike': 0, lexer: 0, ...switches },
      streams: [],
      integritySweeps: sweeps,
      integrityMismatches: 0,
      otherReads: 0,
      systemCalls: 0,
      userLoops: 0,
      userErrors: 0,
      processors: [],
    },
  };
}

// What the statistics channel answers with; docs/host-statistics.md describes it.
import type { LoadedGuest } from '../guest/loader.js';
import type { GuestReport, LexerReport, ProcessorReport, StreamReport } from '../guest/report.js';
import { hex } from '../vmi/address.js';
import type { EventTimesReport } from './event-times.js';
import type { Introspection } from './introspection.js';
import type { ViolationReport } from './violation-counters.js';

/** A workload stream; see `StreamReport`. */
export interface StreamStatistics extends Omit<StreamReport, 'running' | 'count'> {
  readonly running: number;
  readonly count: number;
}

/** The guest's own report, as JSON: counts are numbers, addresses `0x…`. */
export interface GuestStatistics {
  readonly switches: Readonly<Record<StreamReport['form'], number>>;
  readonly lexer?: Readonly<Record<keyof LexerReport, number>>;
  readonly streams: readonly StreamStatistics[];
  readonly integritySweeps: number;
  readonly integrityMismatches: number;
  readonly firstMismatch?: { readonly gva: string; readonly expected: number; readonly found: number };
  readonly otherReads: number;
  readonly systemCalls: number;
  readonly userLoops: number;
  readonly userErrors: number;
  readonly processors: readonly Readonly<Record<keyof ProcessorReport, number>>[];
  readonly bugCheck?: {
    readonly vector: number;
    readonly rip: string;
    readonly errorCode: string;
    readonly cr2: string;
  };
}

export interface HostStatistics {
  readonly uptimeMs: number;
  readonly vcpus: number;
  readonly seed: number;
  /** As `0x…`. */
  readonly kernelBase: string;
  /** A tool is attached. */
  readonly attached: boolean;
  /** Events the tool has not answered, pauses among them. */
  readonly outstandingEvents: number;
  /** For each vCPU, whether it stands in a PAUSE event. */
  readonly paused: readonly boolean[];
  /** Frames whose permissions the tool has taken away. */
  readonly restrictedFrames: number;
  readonly violations: ViolationReport;
  readonly pageFaults: EventTimesReport;
  /** Absent until the guest has booted so far. */
  readonly guest?: GuestStatistics;
}

export function hostStatistics(
  uptimeMs: number,
  guest: Pick<LoadedGuest, 'vcpuCount' | 'seed' | 'kernelBase'>,
  introspection: Introspection,
  violations: ViolationReport,
  report: GuestReport | undefined,
): HostStatistics {
  return {
    uptimeMs,
    vcpus: guest.vcpuCount,
    seed: guest.seed,
    kernelBase: hex(guest.kernelBase),
    attached: introspection.attached,
    outstandingEvents: introspection.outstanding,
    paused: introspection.paused,
    restrictedFrames: introspection.restrictedFrames,
    violations,
    pageFaults: introspection.times.report(),
    ...(report && { guest: guestStatistics(report) }),
  };
}

export function guestStatistics(report: GuestReport): GuestStatistics {
  const { integrity, lexer, bugCheck } = report;
  const { firstMismatch } = integrity;
  return {
    switches: {
      'one-level': Number(report.switches['one-level']),
      'two-level': Number(report.switches['two-level']),
      'look-alike': Number(report.switches['look-alike']),
      lexer: Number(report.switches.lexer),
    },
    ...(lexer && {
      lexer: {
        pieces: Number(lexer.pieces),
        passes: Number(lexer.passes),
        tokens: Number(lexer.tokens),
        checksum: lexer.checksum,
        mismatches: Number(lexer.mismatches),
      },
    }),
    streams: report.streams.map((stream) => ({
      ...stream,
      running: Number(stream.running),
      count: Number(stream.count),
    })),
    integritySweeps: Number(integrity.sweeps),
    integrityMismatches: Number(integrity.mismatches),
    ...(firstMismatch && { firstMismatch: { ...firstMismatch, gva: hex(firstMismatch.gva) } }),
    otherReads: Number(report.otherReads),
    systemCalls: Number(report.systemCalls),
    userLoops: Number(report.userLoops),
    userErrors: Number(report.userErrors),
    processors: report.processors.map(({ ticks, halts, dpcs }) => ({
      ticks: Number(ticks),
      halts: Number(halts),
      dpcs: Number(dpcs),
    })),
    ...(bugCheck && {
      bugCheck: {
        vector: bugCheck.vector,
        rip: hex(bugCheck.rip),
        errorCode: hex(bugCheck.errorCode),
        cr2: hex(bugCheck.cr2),
      },
    }),
  };
}

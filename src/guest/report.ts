import type { Machine } from '../machine/machine.js';
import type { Gva } from '../vmi/address.js';
import type { SwitchForm } from './artefacts.js';
import type { LoadedGuest } from './loader.js';

/** What one workload thread has published about itself, at one moment. */
export interface StreamReport {
  readonly form: SwitchForm;
  readonly vcpu: number;
  /** The state of the stream's generator before its first switch. */
  readonly seed: number;
  /** Switches so far. */
  readonly running: bigint;
  /** The last published pair: after `count` switches the checksum was `checksum`. */
  readonly count: bigint;
  readonly checksum: number;
}

export interface GuestReport {
  readonly streams: readonly StreamReport[];
  readonly switches: Readonly<Record<SwitchForm, bigint>>;
  readonly integrity: {
    /** Full passes over headers, non-writable sections and their slack. */
    readonly sweeps: bigint;
    readonly mismatches: bigint;
    readonly firstMismatch?: { readonly gva: Gva; readonly expected: number; readonly found: number };
  };
  /** Reads of code bytes that are not table loads. */
  readonly otherReads: bigint;
  readonly userLoops: bigint;
  readonly systemCalls: bigint;
  readonly ticks: readonly bigint[];
  /** Set once the guest has stopped itself. */
  readonly bugCheck?: {
    readonly vector: number;
    readonly rip: Gva;
    readonly errorCode: bigint;
    readonly cr2: bigint;
  };
}

/** Reads the guest's own counters; `undefined` until it has booted so far. */
export declare function readGuestReport(machine: Machine, guest: LoadedGuest): GuestReport | undefined;

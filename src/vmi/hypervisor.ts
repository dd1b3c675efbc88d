import type { GprName, Registers } from '../x86/registers.js';
import type { Gfn, Gpa, Gva } from './address.js';

/** An EPT violation: what a vCPU was about to do on a trapped frame. One per page piece of an access. */
export interface Violation {
  readonly vcpu: number;
  /** The instruction that made the access; it has not retired. */
  readonly rip: Gva;
  /** First byte of this page's piece of the access. */
  readonly gva: Gva;
  readonly gpa: Gpa;
  readonly read: boolean;
  readonly write: boolean;
  readonly execute: boolean;
  /** A general-purpose register at the trap. Only to be called while the violation is being handled. */
  register(name: GprName): bigint;
}

/**
 * `undefined` completes the access on guest memory. Bytes answer the read instead: they are laid over it
 * from `violation.gva` on, and must cover the piece up to its end (covering more is harmless; at most 256).
 */
export type ViolationAnswer = Uint8Array | undefined;

export type ViolationHandler = (violation: Violation) => ViolationAnswer;

/** Bytes of one frame that a reader must not see as they are. */
export interface HiddenPiece {
  readonly gpa: Gpa;
  /** What a reader sees. */
  readonly original: Uint8Array;
  /** What is in memory, and is executed. As long as `original`. */
  readonly current: Uint8Array;
}

/**
 * What a hypervisor asks that cannot lay an answer over a read by its address (Xen): it then shows the instruction
 * the original bytes in memory itself.
 */
export interface HiddenMemory {
  /**
   * The bytes that the instruction of a read violation reads, if it reads memory once, from `violation.gva` on and on
   * that page only.
   */
  onlyRead(violation: Violation): number | undefined;
  piecesOn(gfn: Gfn): readonly HiddenPiece[];
  /** While a frame was shown the guest has written to it, and to these of its pieces; what it wrote is there. */
  written(pieces: readonly HiddenPiece[]): void;
}

/**
 * All that the engine asks of a hypervisor. Every method throws a `MemtablesError` (`HYPERVISOR_FAILED`, or
 * `HYPERVISOR_GONE` once the guest's host has closed the connection) and blocks until it is done.
 */
export interface Hypervisor {
  readonly vcpuCount: number;
  /** Exclusive upper end of guest-physical memory. */
  readonly maxPhysicalAddress: Gpa;

  /** Reads guest-physical memory; any length, may cross pages. */
  readPhysical(gpa: Gpa, length: number): Uint8Array;
  /** Writes guest-physical memory; only to be called on a quiescent guest. */
  writePhysical(gpa: Gpa, bytes: Uint8Array): void;
  /** Walks the page table whose root is at `pageTable`; `undefined` where nothing is mapped. */
  translate(pageTable: Gpa, gva: Gva): Gpa | undefined;
  /** Forgets cached pages and translations, so that the next read sees what the guest has now. */
  flushCaches(): void;

  registers(vcpu: number): Registers;
  /** Sets GPRs, RIP and RFLAGS (nothing else); only on a quiescent guest. */
  setRegisters(vcpu: number, registers: Registers): void;

  /**
   * Pauses every vCPU. Not a barrier: an event may still be raised afterwards (see `quiescence.ts`). The violation
   * handler may be called from inside, before the guest is paused, and what it throws is thrown from here.
   */
  pause(): void;
  /** Resumes every vCPU. The violation handler may be called from inside. */
  resume(): void;

  /** Makes a frame execute-only: its reads and writes become violations. */
  trapAccess(gfn: Gfn): void;
  /** Gives a frame all its permissions back. */
  releaseAccess(gfn: Gfn): void;

  /**
   * Who answers violations. Exactly one; without one every access completes on guest memory. Without `hidden`, a read
   * is taken for the only one of its instruction.
   */
  onViolation(handler: ViolationHandler | undefined, hidden?: HiddenMemory): void;
  /**
   * Waits up to `timeoutMs` for violations, has the handler answer them and returns how many there were.
   * An exception of the handler is thrown from here, after the event has been answered.
   */
  listen(timeoutMs: number): number;

  /** Gives every permission back, drains what is outstanding and detaches. Safe to call twice. */
  close(): void;
}

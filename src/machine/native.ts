import { createRequire } from 'node:module';
import { MemtablesError } from '../errors.js';

/** What kept a vCPU from going on; the numbers are those of native/machine/machine.h. */
export const REPORT_GUEST_FAULT = 0;
export const REPORT_DENIED = 1;
export const REPORT_SINGLE_STEP = 2;

export interface NativeReport {
  readonly kind: number;
  readonly vcpu: number;
  /** One of the permission bits. */
  readonly access: number;
  /** The page that was touched; the engine does not say where in it. */
  readonly page: bigint;
  readonly frame: bigint;
  /** Of the page fault that the guest is to get. */
  readonly errorCode: number;
  /** Up to 15 bytes from RIP on. */
  readonly code: Buffer;
}

/** The addon's own interface. It refuses bad arguments with a RangeError and fails with an Error. */
export interface NativeMachine {
  readPhysical(gpa: bigint, length: number): Buffer;
  writePhysical(gpa: bigint, bytes: Uint8Array): void;
  setAccess(gfn: bigint, access: number): void;
  access(gfn: bigint): number;
  registers(vcpu: number, into: BigUint64Array): void;
  /** Sets those whose bit is in `set`. */
  setRegisters(vcpu: number, values: BigUint64Array, set: number): void;
  readMsr(vcpu: number, index: number): bigint;
  pause(vcpu: number): void;
  resume(vcpu: number): void;
  /** Lets one piece of the open instruction through, its read bytes replaced by `data`. */
  answer(vcpu: number, gva: bigint, gfn: bigint, access: number, data?: Uint8Array): void;
  /** Executes `code`, or closes a trap that has no answers; a report means that it is still open. */
  complete(vcpu: number, code: Uint8Array): NativeReport | undefined;
  /** Closes the trap; the instruction is fetched afresh. */
  retry(vcpu: number): void;
  raisePageFault(vcpu: number, gva: bigint, errorCode: number): void;
  setSingleStep(vcpu: number, enabled: boolean): void;
  raiseInterrupt(vcpu: number, vector: number): void;
  setTimer(vector: number, microseconds: number): void;
  /** `true` when no vCPU could run. */
  run(microseconds: number): NativeReport | true | undefined;
  step(vcpu: number, instructions: number): { retired: number; report?: NativeReport };
  takeConsole(): Buffer;
  close(): void;
}

interface Addon {
  readonly NativeMachine: new (vcpus: number, memoryBytes: number) => NativeMachine;
}

const ADDON = '../../build/Release/machine.node';

/** @throws MemtablesError `SETUP_INCOMPLETE` when it has not been built, or does not load here */
export function loadAddon(): Addon {
  try {
    return createRequire(import.meta.url)(ADDON) as Addon;
  } catch (cause) {
    throw new MemtablesError('SETUP_INCOMPLETE', 'the embedded machine has not been built', {
      remedy: 'Run `npm run setup` in the package directory.',
      context: { addon: ADDON },
      cause,
    });
  }
}

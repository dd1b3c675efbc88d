import { createRequire } from 'node:module';
import { MemtablesError } from '../errors.js';

/**
 * The addon's own interface. It refuses bad arguments with a RangeError and fails with an Error. What kept a vCPU
 * from going on it writes into a block of words: report-block.ts.
 */
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
  complete(vcpu: number, code: Uint8Array, report: BigUint64Array): void;
  /** Closes the trap; the instruction is fetched afresh. */
  retry(vcpu: number): void;
  raisePageFault(vcpu: number, gva: bigint, errorCode: number): void;
  setSingleStep(vcpu: number, enabled: boolean): void;
  raiseInterrupt(vcpu: number, vector: number): void;
  setTimer(vector: number, microseconds: number): void;
  /** Returns whether no vCPU could run. */
  run(microseconds: number, untilInput: boolean, report: BigUint64Array): boolean;
  /** Returns how many instructions retired. */
  step(vcpu: number, instructions: number, report: BigUint64Array): number;
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

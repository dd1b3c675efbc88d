// The contract of the embedded machine; see native/machine for what is behind it.
import type { Gfn, Gpa, Gva } from '../vmi/address.js';
import type { Registers } from '../x86/registers.js';

/** Bits of a frame's permission, as the hypervisor's second-level tables hold them. */
export const ACCESS_READ = 1;
export const ACCESS_WRITE = 2;
export const ACCESS_EXECUTE = 4;

export interface MachineOptions {
  /** 1 to 32. */
  readonly vcpus: number;
  /** Guest-physical memory from GPA 0 on; a multiple of 4096. */
  readonly memoryBytes: number;
}

/** A vCPU stopped before an access that the frame's permission denies, or after a single step. */
export interface Trap {
  readonly vcpu: number;
  readonly kind: 'violation' | 'single-step';
  /** The instruction that made the access; it has not retired (for a single step: the next one). */
  readonly rip: Gva;
  /** First byte of this page's piece of the access, and how many bytes of it lie on this page. */
  readonly gva: Gva;
  readonly gpa: Gpa;
  readonly length: number;
  readonly access: 'read' | 'write' | 'execute';
  /** The bytes of the instruction as it was decoded at the trap: what `complete` will carry out. */
  readonly instruction: Buffer;
}

export interface Machine {
  readonly vcpuCount: number;
  readonly memoryBytes: number;

  readPhysical(gpa: Gpa, length: number): Buffer;
  /** Every vCPU sees the bytes at once, code included, through every alias. */
  writePhysical(gpa: Gpa, bytes: Uint8Array): void;
  setAccess(gfn: Gfn, access: number): void;
  access(gfn: Gfn): number;

  /** At any time the vCPU is not inside `run`; exact, also at a trap. */
  registers(vcpu: number): Registers;
  /**
   * While a trap is open, takes effect when it is completed, after the instruction. Another RIP wakes a halted
   * vCPU. The privilege level (CS) cannot be changed.
   */
  setRegisters(vcpu: number, registers: Partial<Registers>): void;
  readMsr(vcpu: number, index: number): bigint;

  /** Counted. A paused vCPU runs no instruction. */
  pause(vcpu: number): void;
  resume(vcpu: number): void;

  /**
   * Completes the trapped instruction as it was decoded, even if its bytes have changed since; `data` is laid
   * over what a read returns, from the trap's `gva` on, and is ignored unless it covers the trap's piece.
   * A further piece of the same instruction is a further trap, delivered by the next `run` or `step`;
   * `step(vcpu, 0)` delivers it, on a paused vCPU too, and runs nothing else. Also ends a single-step trap.
   */
  complete(vcpu: number, data?: Uint8Array): void;
  /** Gives the trapped instruction up: it is fetched, decoded and run afresh from RIP, and may trap again. */
  retry(vcpu: number): void;
  setSingleStep(vcpu: number, enabled: boolean): void;

  /**
   * Makes the vCPU take `vector` (16 to 255) once IF and CR8 allow it: at that instruction when it is stepped, within
   * about 100 microseconds when it runs freely.
   */
  raiseInterrupt(vcpu: number, vector: number): void;
  /** Raises `vector` on every vCPU at this wall-clock period while `run` is used; 0 stops it. */
  setTimer(vector: number, microseconds: number): void;

  /**
   * Runs the vCPUs that can run, in turn, for about `microseconds` of wall time. Returns early, with the traps
   * that are new, as soon as there are any. `idle` says that no vCPU could run. With `untilInput` it also returns,
   * within about 100 microseconds, once something has come in for this thread's event loop; a timer is not input.
   */
  run(
    microseconds: number,
    untilInput?: boolean,
  ): { readonly traps: readonly Trap[]; readonly idle: boolean };
  /**
   * Runs one vCPU for exactly `instructions` (fewer at a trap, a halt); returns how many retired. An iteration of
   * a repeated string instruction counts as one, and so do MOV SS or POP SS with the instruction behind.
   */
  step(vcpu: number, instructions: number): { readonly retired: number; readonly trap?: Trap };

  /** What the guest wrote to its console port since the last call. */
  takeConsole(): string;
  close(): void;
}

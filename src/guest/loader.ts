import type { Machine } from '../machine/machine.js';
import type { Gpa, Gva } from '../vmi/address.js';

export interface GuestOptions {
  /** `ntoskrnl.exe` as the set-up built it. */
  readonly image: Buffer;
  /** Chooses the kernel base, the physical placement and the workload; 32 bits. */
  readonly seed: number;
}

/** Where a guest was put. */
export interface LoadedGuest {
  readonly kernelBase: Gva;
  readonly imageSize: number;
  /** CR3 of the System process. */
  readonly directoryTable: Gpa;
  readonly seed: number;
  readonly vcpuCount: number;
  /** What the host and the guest's platform layer hand each other (native/guest/platform). */
  readonly bootBlock: Gva;
  /** Translates an address of the image, the pool or a kernel stack. */
  translate(gva: Gva): Gpa | undefined;
}

/**
 * Places the image into the machine and every vCPU at its entry point.
 *
 * @throws MemtablesError `IMAGE_INVALID`, or `INVALID_ARGUMENT` when the machine has too little memory
 */
export declare function loadGuest(machine: Machine, options: GuestOptions): LoadedGuest;

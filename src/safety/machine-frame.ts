import { isKernelAddress } from '../nt/structure.js';
import type { Gva } from '../vmi/address.js';
import type { GuestMemory } from '../vmi/guest-memory.js';

// What the processor pushes for an interrupt or exception, from the lowest address: RIP, CS, RFLAGS, RSP, SS.
const CS = 8;
const RFLAGS = 16;
const RSP = 24;
const SS = 32;
export const MACHINE_FRAME_BYTES = 40;
/** Before it pushes, the processor aligns RSP. */
const FRAME_ALIGNMENT_MASK = 15n;

/** NT's KGDT64_R0_CODE. */
const KERNEL_CODE_SELECTOR = 0x10;
const RFLAGS_ALWAYS_SET = 2n;
const RFLAGS_NEVER_SET = ~0x3f_7fd7n & 0xffff_ffff_ffff_ffffn;

/** Of the kernel code that an interrupt or exception stopped: where it goes on. */
export interface MachineFrame {
  readonly rip: Gva;
  readonly rsp: Gva;
  /** 16 bits. */
  readonly ss: number;
}

/**
 * The machine frame of kernel code whose RIP lies at `where`, if there can be one. Code that calls nothing is returned
 * to in no other way.
 *
 * @throws MemtablesError `GUEST_MEMORY_UNMAPPED` when there is no memory for a whole frame
 */
export function readMachineFrame(memory: GuestMemory, where: Gva): MachineFrame | undefined {
  const frame = memory.read(where, MACHINE_FRAME_BYTES);
  const flags = frame.readBigUInt64LE(RFLAGS);
  const rsp = frame.readBigUInt64LE(RSP);
  const isOne =
    frame.readUInt16LE(CS) === KERNEL_CODE_SELECTOR &&
    (flags & RFLAGS_ALWAYS_SET) !== 0n &&
    (flags & RFLAGS_NEVER_SET) === 0n &&
    isKernelAddress(rsp);
  return isOne ? { rip: frame.readBigUInt64LE(), rsp, ss: frame.readUInt16LE(SS) } : undefined;
}

/** Where the processor pushes a machine frame when RSP is `rsp`. */
export function machineFrameBelow(rsp: Gva): Gva {
  return (rsp & ~FRAME_ALIGNMENT_MASK) - BigInt(MACHINE_FRAME_BYTES);
}

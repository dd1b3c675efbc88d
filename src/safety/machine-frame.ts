import { isKernelAddress } from '../nt/structure.js';
import type { Gva } from '../vmi/address.js';
import type { GuestMemory } from '../vmi/guest-memory.js';

// What the processor pushes for an interrupt or exception, from the lowest address: RIP, CS, RFLAGS, RSP, SS.
const CS = 8;
const RFLAGS = 16;
const RSP = 24;
const MACHINE_FRAME_BYTES = 40;

/** NT's KGDT64_R0_CODE. */
const KERNEL_CODE_SELECTOR = 0x10;
const RFLAGS_ALWAYS_SET = 2n;
const RFLAGS_NEVER_SET = ~0x3f_7fd7n & 0xffff_ffff_ffff_ffffn;

/**
 * Whether the value at `where` on a stack can be the RIP of a machine frame of kernel code. Code that calls nothing
 * is returned to in no other way.
 *
 * @throws MemtablesError `GUEST_MEMORY_UNMAPPED` when there is no memory for a whole frame
 */
export function isMachineFrame(memory: GuestMemory, where: Gva): boolean {
  const frame = memory.read(where, MACHINE_FRAME_BYTES);
  const flags = frame.readBigUInt64LE(RFLAGS);
  return (
    frame.readUInt16LE(CS) === KERNEL_CODE_SELECTOR &&
    (flags & RFLAGS_ALWAYS_SET) !== 0n &&
    (flags & RFLAGS_NEVER_SET) === 0n &&
    isKernelAddress(frame.readBigUInt64LE(RSP))
  );
}

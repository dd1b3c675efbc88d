import type { Kernel } from './kernel.js';

const FLAG = 'KdEnteredDebugger';

/**
 * Whether the kernel debugger has stopped the guest, or that cannot be told: it keeps the registers of every processor
 * in a place of its own, and puts them back from there. False when the profile does not have its flag.
 */
export function isInDebugger(kernel: Kernel): boolean {
  return kernel.profile.hasSymbol(FLAG) && kernel.memory.readIfMapped(kernel.symbol(FLAG), 1)?.[0] !== 0;
}

import type { LoadSite } from '../../src/handlers/plan.js';

export const IMAGE_BASE = 0xffff_8000_1200_0000n;

/** The example of HVMI's documentation: `mov ecx, dword ptr [rdx+rax*4+0x4ea91c]`. */
export const LOAD: LoadSite = {
  gva: 0xffff_8000_1234_0000n,
  length: 7,
  dst: 'rcx',
  dstBits: 32,
  idx: 'rax',
  base: 'rdx',
  baseValue: IMAGE_BASE,
  addressBits: 64,
};

/** Where its handler is put. */
export const HANDLER = 0xffff_8000_5678_0000n;

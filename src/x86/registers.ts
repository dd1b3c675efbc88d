/** The 16 general-purpose registers, in the order of their encodings (rax is 0, r15 is 15). */
export const GPR_NAMES = [
  'rax',
  'rcx',
  'rdx',
  'rbx',
  'rsp',
  'rbp',
  'rsi',
  'rdi',
  'r8',
  'r9',
  'r10',
  'r11',
  'r12',
  'r13',
  'r14',
  'r15',
] as const;

export type GprName = (typeof GPR_NAMES)[number];

/** A vCPU's registers, all as unsigned 64-bit values; the selectors in their low 16 bits. */
export interface Registers extends Record<GprName, bigint> {
  rip: bigint;
  rflags: bigint;
  cr0: bigint;
  cr2: bigint;
  cr3: bigint;
  cr4: bigint;
  efer: bigint;
  lstar: bigint;
  fsBase: bigint;
  gsBase: bigint;
  /** The GS base that SWAPGS would bring in. */
  shadowGs: bigint;
  cs: bigint;
  ss: bigint;
  trBase: bigint;
  idtrBase: bigint;
  gdtrBase: bigint;
}

/** True when the code segment's privilege level is 3. */
export function inUserMode(registers: Pick<Registers, 'cs'>): boolean {
  return (registers.cs & 3n) === 3n;
}

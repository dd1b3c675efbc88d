import { createMachine } from '../../src/machine/create-machine.js';
import type { Machine, Trap } from '../../src/machine/machine.js';
import { type Gpa, type Gva, gfnOf } from '../../src/vmi/address.js';
import type { Registers } from '../../src/x86/registers.js';

/** GPA `a` is mapped at GVA `a`, for user mode too, and at `KERNEL_BASE + a`, for the kernel only. */
export const KERNEL_BASE: Gva = 0xffff_f800_0000_0000n;

/** Frames that tests use for code, for data (two of them), and for what must never trap. */
export const CODE: Gpa = 0x10000n;
export const DATA: Gpa = 0x20000n;
export const SCRATCH: Gpa = 0x30000n;

/** Selectors as Windows has them. */
export const SELECTORS = {
  kernelCode: 0x10n,
  kernelData: 0x18n,
  userData: 0x2bn,
  userCode: 0x33n,
  tss: 0x40n,
};

export interface FlatMachineOptions {
  readonly vcpus?: number;
  /** At most 1 GB; the last megabyte holds tables and stacks. */
  readonly memoryBytes?: number;
}

const MB = 1024 * 1024;
const SYSTEM_BYTES = MB;

/** Offsets in the last megabyte. */
const PML4 = 0x0;
const PDPT_LOW = 0x1000;
const PDPT_HIGH = 0x2000;
const PAGE_DIRECTORY = 0x3000;
const GDT = 0x4000;
const IDT = 0x5000;
const TSS = 0x6000;
const STUBS = 0x8000;
const STACKS = 0x10000;
const IST_STACKS = 0x60000;
const TSS_STRIDE = 0x80;
const TSS_RSP0 = 4;
const TSS_IST1 = 36;
const STUB_STRIDE = 0x10;
const STACK_STRIDE = 0x2000;

const PRESENT_WRITABLE = 3n;
const USER = 4n;
const LARGE = 0x80n;
const LARGE_PAGE_BYTES = 2 * MB;

const CR0 = 0x8001_0033n; // PG WP NE ET MP PE
const CR4 = 0x6a0n; // PAE PGE OSFXSR OSXMMEXCPT
const EFER = 0xd01n; // NXE LMA LME SCE

const INTERRUPT_GATE = 0x8en;

/**
 * A machine in long mode whose vCPUs are ready to run at privilege level 0, with flat mappings, a GDT, a TSS
 * with stacks, and an IDT whose handlers only halt (`handlerOf`).
 */
export function createFlatMachine({ vcpus = 1, memoryBytes = 16 * MB }: FlatMachineOptions = {}): Machine {
  const machine = createMachine({ vcpus, memoryBytes });
  const system = systemArea(machine);
  const tables = Buffer.alloc(SYSTEM_BYTES);
  const entry = (offset: number, value: bigint) => tables.writeBigUInt64LE(value, offset);

  entry(PML4, (system + BigInt(PDPT_LOW)) | PRESENT_WRITABLE | USER);
  entry(PML4 + Number((KERNEL_BASE >> 39n) & 0x1ffn) * 8, (system + BigInt(PDPT_HIGH)) | PRESENT_WRITABLE);
  entry(PDPT_LOW, (system + BigInt(PAGE_DIRECTORY)) | PRESENT_WRITABLE | USER);
  entry(PDPT_HIGH, (system + BigInt(PAGE_DIRECTORY)) | PRESENT_WRITABLE);
  for (let at = 0; at < memoryBytes; at += LARGE_PAGE_BYTES) {
    entry(PAGE_DIRECTORY + (at / LARGE_PAGE_BYTES) * 8, BigInt(at) | LARGE | PRESENT_WRITABLE | USER);
  }

  entry(GDT + 0x10, 0x0020_9b00_0000_0000n);
  entry(GDT + 0x18, 0x00cf_9300_0000_ffffn);
  entry(GDT + 0x28, 0x00cf_f300_0000_ffffn);
  entry(GDT + 0x30, 0x0020_fb00_0000_0000n);

  for (let vector = 0; vector < 256; vector++) {
    tables.set(gate(handlerOf(machine, vector)), IDT + vector * 16);
    tables.set([0xf4, 0xeb, 0xfd], STUBS + vector * STUB_STRIDE); // hlt; jmp $-1
  }
  for (let vcpu = 0; vcpu < vcpus; vcpu++) {
    const tss = TSS + vcpu * TSS_STRIDE;
    entry(tss + TSS_RSP0, kernelStackOf(machine, vcpu));
    entry(tss + TSS_IST1, interruptStackOf(machine, vcpu));
  }
  machine.writePhysical(system, tables);

  for (let vcpu = 0; vcpu < vcpus; vcpu++) {
    machine.setRegisters(vcpu, {
      rsp: kernelStackOf(machine, vcpu),
      rip: handlerOf(machine, 0),
      rflags: 2n,
      efer: EFER,
      cr3: system,
      cr4: CR4,
      cr0: CR0,
      cs: SELECTORS.kernelCode,
      ss: SELECTORS.kernelData,
      gdtrBase: KERNEL_BASE + system + BigInt(GDT),
      idtrBase: KERNEL_BASE + system + BigInt(IDT),
      trBase: KERNEL_BASE + system + BigInt(TSS + vcpu * TSS_STRIDE),
    });
  }
  return machine;
}

/** Where the default handler of a vector starts; it halts. */
export function handlerOf(machine: Machine, vector: number): Gva {
  return KERNEL_BASE + systemArea(machine) + BigInt(STUBS + vector * STUB_STRIDE);
}

/** The stack that an interrupt from user mode switches to: its top. */
export function kernelStackOf(machine: Machine, vcpu: number): Gva {
  return KERNEL_BASE + systemArea(machine) + BigInt(STACKS + (vcpu + 1) * STACK_STRIDE);
}

/** The stack of gates with IST 1: its top. */
export function interruptStackOf(machine: Machine, vcpu: number): Gva {
  return KERNEL_BASE + systemArea(machine) + BigInt(IST_STACKS + (vcpu + 1) * STACK_STRIDE);
}

/** The GPA of the TSS field that holds that top. */
export function interruptStackSlot(machine: Machine, vcpu: number): Gpa {
  return systemArea(machine) + BigInt(TSS + vcpu * TSS_STRIDE + TSS_IST1);
}

/** Points a vector at another handler. */
export function setGate(
  machine: Machine,
  vector: number,
  handler: Gva,
  options: { ist?: number; privilege?: number } = {},
): void {
  machine.writePhysical(systemArea(machine) + BigInt(IDT + vector * 16), gate(handler, options));
}

/** Where the page tables, descriptor tables and stacks begin. */
export function systemArea(machine: Machine): Gpa {
  return BigInt(machine.memoryBytes - SYSTEM_BYTES);
}

/** The entry of the page directory that maps `gpa` (2 MB), at both addresses. */
export function pageDirectoryEntry(machine: Machine, gpa: Gpa): Gpa {
  return systemArea(machine) + BigInt(PAGE_DIRECTORY) + (gpa / BigInt(LARGE_PAGE_BYTES)) * 8n;
}

function gate(handler: Gva, { ist = 0, privilege = 0 } = {}): Buffer {
  const bytes = Buffer.alloc(16);
  const low =
    (handler & 0xffffn) |
    (SELECTORS.kernelCode << 16n) |
    (BigInt(ist) << 32n) |
    ((INTERRUPT_GATE | (BigInt(privilege) << 5n)) << 40n) |
    (((handler >> 16n) & 0xffffn) << 48n);
  bytes.writeBigUInt64LE(low, 0);
  bytes.writeBigUInt64LE(handler >> 32n, 8);
  return bytes;
}

/** Sets the permission of `frames` frames from `gpa` on. */
export function setAccess(machine: Machine, gpa: Gpa, frames: number, access: number): void {
  for (let index = 0; index < frames; index++) machine.setAccess(gfnOf(gpa) + BigInt(index), access);
}

/** Bytes from hexadecimal digits; blanks are ignored. */
export function hexBytes(digits: string): Buffer {
  return Buffer.from(digits.replaceAll(/\s/g, ''), 'hex');
}

export interface RunOptions {
  readonly vcpu?: number;
  /** Answers each violation; without it every access completes on real memory. */
  readonly onTrap?: (trap: Trap) => Uint8Array | undefined;
  readonly mostInstructions?: number;
}

/**
 * Puts `code` and a HLT at `at` (identity mapped), runs it from `registers`, and returns all registers once it
 * has halted, and the traps on the way.
 */
export function runCode(
  machine: Machine,
  at: Gpa,
  code: Uint8Array,
  registers: Partial<Registers> = {},
  { vcpu = 0, onTrap, mostInstructions = 10_000 }: RunOptions = {},
): { registers: Registers; traps: Trap[] } {
  machine.writePhysical(at, Buffer.concat([code, Buffer.of(0xf4)]));
  machine.setRegisters(vcpu, { rip: at, ...registers });
  const traps: Trap[] = [];
  for (let left = mostInstructions; left > 0; ) {
    const { retired, trap } = machine.step(vcpu, left);
    left -= retired;
    if (trap === undefined) {
      if (left === 0) break;
      return { registers: machine.registers(vcpu), traps };
    }
    traps.push(trap);
    machine.complete(vcpu, onTrap?.(trap));
  }
  throw new Error(`the code did not halt within ${mostInstructions} instructions`);
}

import { type Gva, hex } from '../vmi/address.js';
import type { Registers } from '../x86/registers.js';
import type { Kernel } from './kernel.js';
import { isKernelAddress, kernelPointer, Layout, structureInvalid } from './structure.js';

/** What NT itself supports is 2,048; its array of processor blocks has a place for each. */
const MAX_PROCESSORS = 2048;
/** KTSS64, as the processor defines it: RSP0 at 4, IST1 at 0x24. */
const TSS_RSP0 = 4;
const TSS_IST1 = 0x24;
const IST_COUNT = 7;
const TSS_STACKS_END = TSS_IST1 + IST_COUNT * 8;

/** What NT knows of the processor that a vCPU is. Stack addresses are exclusive upper ends. */
export interface Processor {
  readonly vcpu: number;
  readonly kpcr: Gva;
  readonly currentThread: Gva;
  readonly idleThread: Gva;
  /** Where system calls of the current thread begin to push; 0 for a thread that makes none. */
  readonly rspBase: Gva;
  /** Where interrupts out of user mode begin to push. */
  readonly rsp0: Gva;
  readonly dpcStack: Gva;
  /** 0 where this kernel has none. */
  readonly isrStack: Gva;
  /** The stacks of #DF, NMI, machine check and the like that are set up. */
  readonly ist: readonly Gva[];
}

/**
 * The processor that `vcpu` is, or `undefined` when its KPCR cannot be found (it has not been brought up).
 *
 * In user mode the KPCR is not in GS but behind SWAPGS, and some hypervisors do not tell that value: then the
 * task register finds it, which every processor has to itself.
 *
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID`, `GUEST_MEMORY_UNMAPPED`
 */
export function findProcessor(kernel: Kernel, vcpu: number, registers: Registers): Processor | undefined {
  const { memory, profile } = kernel;
  const pcrLayout = new Layout(profile, '_KPCR', { TssBase: 8, Self: 8, CurrentPrcb: 8 });
  const prcbOffset = BigInt(profile.offset('_KPCR', 'Prcb'));
  const isPcr = (gva: Gva, tss: Gva | undefined): boolean => {
    if (!isKernelAddress(gva) || !memory.isMapped(gva)) return false;
    const pcr = pcrLayout.read(memory, gva);
    return (
      pcr.u64('Self') === gva &&
      pcr.u64('CurrentPrcb') === gva + prcbOffset &&
      (tss === undefined || pcr.u64('TssBase') === tss)
    );
  };
  let kpcr = [registers.gsBase, registers.shadowGs].find((gva) => isPcr(gva, undefined));
  if (kpcr === undefined) {
    for (const prcb of processorBlocks(kernel)) {
      if (!isPcr(prcb - prcbOffset, registers.trBase)) continue;
      kpcr = prcb - prcbOffset;
      break;
    }
  }
  return kpcr === undefined ? undefined : readProcessor(kernel, vcpu, kpcr, registers.trBase);
}

function* processorBlocks(kernel: Kernel): Generator<Gva> {
  const array = kernel.symbol('KiProcessorBlock');
  for (let index = 0; index < MAX_PROCESSORS; index++) {
    const prcb = kernel.memory.readU64(array + BigInt(index * 8));
    if (prcb === 0n) return;
    yield kernelPointer(prcb, `KiProcessorBlock[${index}]`);
  }
}

function readProcessor(kernel: Kernel, vcpu: number, kpcr: Gva, trBase: Gva): Processor {
  const { memory, profile } = kernel;
  const prcbGva = kpcr + BigInt(profile.offset('_KPCR', 'Prcb'));
  const prcb = new Layout(profile, '_KPRCB', { CurrentThread: 8, IdleThread: 8, RspBase: 8 }).read(
    memory,
    prcbGva,
  );
  const dpcStack = new Layout(profile, '_KPRCB', { DpcStack: 8 }).read(memory, prcbGva).u64('DpcStack');
  const isrStack = profile.hasField('_KPRCB', 'IsrStack')
    ? new Layout(profile, '_KPRCB', { IsrStack: 8 }).read(memory, prcbGva).u64('IsrStack')
    : 0n;
  const tss = memory.read(kernelPointer(trBase, `the task register of vCPU ${vcpu}`), TSS_STACKS_END);
  const ist = Array.from({ length: IST_COUNT }, (_, index) => tss.readBigUInt64LE(TSS_IST1 + index * 8));
  for (const top of [dpcStack, isrStack, ...ist]) checkStackTop(top, vcpu);
  return {
    vcpu,
    kpcr,
    currentThread: kernelPointer(prcb.u64('CurrentThread'), `the current thread of vCPU ${vcpu}`),
    idleThread: kernelPointer(prcb.u64('IdleThread'), `the idle thread of vCPU ${vcpu}`),
    rspBase: prcb.u64('RspBase'),
    rsp0: tss.readBigUInt64LE(TSS_RSP0),
    dpcStack,
    isrStack,
    ist: ist.filter((top) => top !== 0n),
  };
}

function checkStackTop(top: Gva, vcpu: number): void {
  if (top !== 0n && (!isKernelAddress(top) || top % 8n !== 0n)) {
    throw structureInvalid(`a stack of vCPU ${vcpu} is said to end at ${hex(top)}`, { vcpu, top });
  }
}

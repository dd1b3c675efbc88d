// The guest as a kernel for a Xen PVH domain: its memory as the loader leaves it, in an ELF file.
import { MemtablesError } from '../errors.js';
import { type Gfn, type Gpa, gfnOf, gpaOfFrame, PAGE_SIZE } from '../vmi/address.js';
import { elfFile, type Segment } from './elf.js';
import {
  type EntryRegisters,
  type GuestOptions,
  type GuestTarget,
  type LoadedGuest,
  loadGuest,
} from './loader.js';

export interface PvhDomain {
  /** The start-up page, as the set-up built it. */
  readonly startPage: Buffer;
  /** 1 to 32. */
  readonly vcpus: number;
  /** Of the domain, in MB. */
  readonly memoryMB: number;
}

export interface PvhOptions extends GuestOptions, PvhDomain {
  /** The HAL of a PVH domain. */
  readonly hal: Buffer;
}

export interface PvhKernel {
  /** For `kernel=` of a domain with `type="pvh"`, that many vCPUs and that much memory. */
  readonly elf: Buffer;
  readonly guest: LoadedGuest;
}

// The start-up page, by native/guest/platform/pvh.inc.
export const START_FRAME: Gfn = 1n;
const DOMAIN_ENTRY = 0x40n;
const CR3 = 0x400;
const CR4 = 0x408;
const EFER = 0x410;
const CR0 = 0x418;
const RIP = 0x420;
const BOOT_BLOCK = 0x428;
const PROCESSORS = 0x430;
const STACKS = 0x440;
const STACK_BYTES = 8;
const MAX_VCPUS = 32;

const BYTES_PER_MB = 1024 * 1024;
/** Behind the kernel Xen's tools put what they tell it, which it does not read. */
const XEN_MB = 4;
/** `XEN_ELFNOTE_PHYS32_ENTRY`: where a PVH domain enters its kernel. */
const PHYS32_ENTRY = { owner: 'Xen', type: 18 };
/** A processor says by itself when it has come to long mode. */
const EFER_LMA = 0x400n;

/**
 * Makes the kernel of a domain whose guest is loaded as `loadGuest` does it.
 *
 * @throws MemtablesError as `loadGuest`, and `INVALID_ARGUMENT` when the guest cannot have that many vCPUs
 */
export function pvhKernel(options: PvhOptions): PvhKernel {
  let guest: LoadedGuest | undefined;
  const elf = pvhElf(options, (memory) => {
    guest = loadGuest(memory, options);
    return guest.bootBlock;
  });
  return { elf, guest: guest! };
}

/**
 * Makes the kernel of a domain from what `load` puts into its memory; what `load` returns is in RCX where a processor
 * enters the kernel, and the processor's number in EDX.
 *
 * @throws MemtablesError `INVALID_ARGUMENT` when the domain cannot have that many vCPUs; what `load` throws
 */
export function pvhElf(
  { vcpus, memoryMB, startPage }: PvhDomain,
  load: (memory: GuestTarget) => bigint,
): Buffer {
  if (!Number.isInteger(vcpus) || vcpus < 1 || vcpus > MAX_VCPUS) {
    throw new MemtablesError('INVALID_ARGUMENT', `the guest cannot have ${vcpus} vCPUs`, {
      remedy: `Use 1 to ${MAX_VCPUS}.`,
      context: { vcpus },
    });
  }
  const memory = new KernelFrames(vcpus, Math.max(memoryMB - XEN_MB, 0) * BYTES_PER_MB);
  const argument = load(memory);
  memory.writePhysical(gpaOfFrame(START_FRAME), withParameters(startPage, memory.entries, argument));
  const entry = gpaOfFrame(START_FRAME) + DOMAIN_ENTRY;
  const descriptor = Buffer.alloc(4);
  descriptor.writeUInt32LE(Number(entry));
  return elfFile(entry, { ...PHYS32_ENTRY, descriptor }, memory.segments());
}

function withParameters(page: Buffer, entries: readonly EntryRegisters[], argument: bigint): Buffer {
  const filled = Buffer.from(page);
  const [first] = entries;
  const { cr0, cr3, cr4, efer, rip } = first!;
  filled.writeBigUInt64LE(cr3, CR3);
  filled.writeBigUInt64LE(cr4, CR4);
  filled.writeBigUInt64LE(efer & ~EFER_LMA, EFER);
  filled.writeBigUInt64LE(cr0, CR0);
  filled.writeBigUInt64LE(rip, RIP);
  filled.writeBigUInt64LE(argument, BOOT_BLOCK);
  filled.writeBigUInt64LE(BigInt(entries.length), PROCESSORS);
  entries.forEach(({ rsp }, processor) => {
    filled.writeBigUInt64LE(rsp, STACKS + processor * STACK_BYTES);
  });
  return filled;
}

/** A domain's memory before there is a domain: the frames that have been written. */
class KernelFrames implements GuestTarget {
  readonly startFrame = START_FRAME;
  /** By processor. */
  readonly entries: EntryRegisters[] = [];
  readonly #frames = new Map<bigint, Buffer>();

  constructor(
    readonly vcpuCount: number,
    readonly memoryBytes: number,
  ) {}

  /** Inside of one page. */
  writePhysical(gpa: Gpa, bytes: Uint8Array): void {
    const gfn = gfnOf(gpa);
    const frame = this.#frames.get(gfn) ?? Buffer.alloc(PAGE_SIZE);
    frame.set(bytes, Number(gpa - gpaOfFrame(gfn)));
    this.#frames.set(gfn, frame);
  }

  setRegisters(vcpu: number, registers: EntryRegisters): void {
    this.entries[vcpu] = registers;
  }

  /** Frames that follow each other are one segment. */
  segments(): Segment[] {
    const segments: { gpa: Gpa; frames: Buffer[] }[] = [];
    let next: bigint | undefined;
    for (const [gfn, frame] of [...this.#frames].sort(([left], [right]) => Number(left - right))) {
      if (gfn === next) segments.at(-1)!.frames.push(frame);
      else segments.push({ gpa: gpaOfFrame(gfn), frames: [frame] });
      next = gfn + 1n;
    }
    return segments.map(({ gpa, frames }) => ({ gpa, bytes: Buffer.concat(frames) }));
  }
}

import { MemtablesError } from '../errors.js';
import { type Gpa, type Gva, PAGE_SIZE, pageBase } from '../vmi/address.js';
import { GuestMemory } from '../vmi/guest-memory.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import type { Registers } from '../x86/registers.js';
import { imageSize, KernelImage, MAX_IMAGE_BYTES, type MappedReader, NT, readImage } from './kernel-image.js';
import { pageTableRoot } from './page-table.js';
import type { PdbReference, PeImage } from './pe.js';
import type { Profile } from './profile.js';
import { isKernelAddress, kernelPointer, Layout, structureInvalid } from './structure.js';

const EFER_LONG_MODE_ACTIVE = 1n << 10n;
const CR4_FIVE_LEVEL_PAGING = 1n << 12n;
/** MZ. */
const DOS_MAGIC = 0x5a4d;
/** An SSDT entry is a 32-bit offset. */
const SSDT_ENTRY_SIZE = 4;
/** A service number has 12 bits. */
const MAX_SERVICES = 0x1000;

/** A half-open range of guest virtual addresses. */
export interface GvaRange {
  readonly start: Gva;
  readonly end: Gva;
}

/** The kernel of a running guest: where it is, what it looked like, and how to read it now. */
export class Kernel extends KernelImage {
  constructor(
    base: Gva,
    image: PeImage,
    holes: ReadonlySet<number>,
    /** The kernel's address space as it is now, through the page table of the System process. */
    readonly memory: GuestMemory,
    readonly profile: Profile,
    /** The table of system services, which is read like a switch table but is none. */
    readonly ssdt: GvaRange,
  ) {
    super(NT, base, image, holes);
  }

  /** The address of a symbol. @throws MemtablesError `SYMBOL_NOT_FOUND`, `PROFILE_INVALID` */
  symbol(name: string): Gva {
    return this.base + BigInt(this.symbolRva(name));
  }

  /** Of any symbol of the profile. @throws MemtablesError `SYMBOL_NOT_FOUND`, `PROFILE_INVALID` */
  override symbolRva(name: string): number {
    return checkedSymbol(this.profile, this.image, name);
  }

  override symbolAfter(rva: number): number | undefined {
    return this.profile.symbolAfter(rva);
  }
}

/**
 * Finds the kernel and checks that `profile` describes it. To be called on a quiescent guest.
 *
 * Whether the guest runs under VBS cannot be seen from here: its hypervisor hides behind ours.
 *
 * @throws MemtablesError
 * - `GUEST_UNSUPPORTED`: not a 64-bit Windows, or one with 5-level paging;
 * - `KERNEL_NOT_FOUND`: no vCPU shows it now (all of them in user mode under KVA shadow): try again;
 * - `PROFILE_MISMATCH`: the profile is of another build;
 * - `IMAGE_INVALID`: the image is damaged or cannot be read whole;
 * - `GUEST_STRUCTURE_INVALID`, `GUEST_MEMORY_UNMAPPED`, `SYMBOL_NOT_FOUND`, `PROFILE_INVALID`.
 */
export function discoverKernel(hypervisor: Hypervisor, profile: Profile): Kernel {
  const { base, memory } = locate(hypervisor);
  const { image, holes } = readImage(mappedReader(memory), base);
  checkIdentity(image.pdb(), profile);
  const systemMemory = openSystemMemory(hypervisor, profile, image, base, memory);
  const ssdt = readSsdtRange(systemMemory, profile, image, base);
  return new Kernel(base, image, holes, systemMemory, profile, ssdt);
}

/** True for a vCPU that has been started and runs in long mode. */
export function isActive(registers: Pick<Registers, 'efer' | 'cr3'>): boolean {
  return (registers.efer & EFER_LONG_MODE_ACTIVE) !== 0n && pageTableRoot(registers.cr3) !== 0n;
}

/** Looks below the system call entry, through each vCPU's page table in turn: a user CR3 does not map it. */
function locate(hypervisor: Hypervisor): { base: Gva; memory: GuestMemory } {
  let entrySeen = false;
  for (let vcpu = 0; vcpu < hypervisor.vcpuCount; vcpu++) {
    const registers = hypervisor.registers(vcpu);
    if (!isActive(registers)) continue;
    if ((registers.cr4 & CR4_FIVE_LEVEL_PAGING) !== 0n) {
      throw unsupported('the guest uses 5-level paging', { vcpu, cr4: registers.cr4 });
    }
    if (!isKernelAddress(registers.lstar)) continue;
    entrySeen = true;
    const memory = new GuestMemory(hypervisor, pageTableRoot(registers.cr3));
    const base = findImageBelow(memory, registers.lstar);
    if (base !== undefined) return { base, memory };
  }
  if (!entrySeen) throw unsupported('no vCPU runs a 64-bit kernel with a system call entry', {});
  throw new MemtablesError('KERNEL_NOT_FOUND', 'no vCPU shows a kernel image below its system call entry', {
    remedy: 'Try again: while every vCPU runs user code under KVA shadow, the kernel is not mapped.',
    context: { vcpus: hypervisor.vcpuCount },
  });
}

function unsupported(reason: string, context: Readonly<Record<string, unknown>>): MemtablesError {
  return new MemtablesError('GUEST_UNSUPPORTED', `the guest is not supported: ${reason}`, {
    remedy: 'Attach to a 64-bit Windows guest with 4-level paging, once it has booted.',
    context,
  });
}

function findImageBelow(memory: GuestMemory, lstar: Gva): Gva | undefined {
  const read = mappedReader(memory);
  const lowest = lstar - BigInt(MAX_IMAGE_BYTES);
  for (let page = pageBase(lstar); page > lowest && isKernelAddress(page); page -= BigInt(PAGE_SIZE)) {
    if (!memory.isMapped(page) || memory.readU16(page) !== DOS_MAGIC) continue;
    if (lstar < page + BigInt(imageSize(read, page))) return page;
  }
  return undefined;
}

function mappedReader(memory: GuestMemory): MappedReader {
  return (gva, length) => memory.readIfMapped(gva, length);
}

function checkIdentity(found: PdbReference | undefined, profile: Profile): void {
  const wanted = profile.pdb;
  if (
    found !== undefined &&
    found.guid === wanted.guid &&
    found.age === wanted.age &&
    found.name.toLowerCase() === wanted.name.toLowerCase()
  ) {
    return;
  }
  const guest = found === undefined ? 'a kernel that names no PDB' : describePdb(found);
  throw new MemtablesError(
    'PROFILE_MISMATCH',
    `the guest runs ${guest}, the profile describes ${describePdb(wanted)}`,
    {
      remedy: `Use a profile made from the PDB of the guest's kernel${found === undefined ? '' : ` (${describePdb(found)})`}.`,
      context: { guest: found, profile: wanted, source: profile.source },
    },
  );
}

function describePdb(pdb: PdbReference): string {
  return `${pdb.name} ${pdb.guid}-${pdb.age}`;
}

/** The System process's page table maps the kernel whatever the vCPUs are doing. */
function openSystemMemory(
  hypervisor: Hypervisor,
  profile: Profile,
  image: PeImage,
  base: Gva,
  memory: GuestMemory,
): GuestMemory {
  const pointer = base + BigInt(checkedSymbol(profile, image, 'PsInitialSystemProcess'));
  const system = kernelPointer(memory.readU64(pointer), 'PsInitialSystemProcess');
  const root = new Layout(profile, '_KPROCESS', { DirectoryTableBase: 8 }).read(memory, system);
  const pageTable: Gpa = pageTableRoot(root.u64('DirectoryTableBase'));
  if (hypervisor.translate(pageTable, base) !== memory.translate(base)) {
    throw structureInvalid('the page table of the System process does not map the kernel', {
      system,
      pageTable,
      base,
    });
  }
  return new GuestMemory(hypervisor, pageTable);
}

function readSsdtRange(memory: GuestMemory, profile: Profile, image: PeImage, base: Gva): GvaRange {
  const rva = checkedSymbol(profile, image, 'KiServiceTable');
  const services = memory.readU32(base + BigInt(checkedSymbol(profile, image, 'KiServiceLimit')));
  const size = services * SSDT_ENTRY_SIZE;
  if (services === 0 || services > MAX_SERVICES || rva + size > image.sizeOfImage) {
    throw structureInvalid(`the system service table is said to have ${services} entries`, { rva, services });
  }
  const start = base + BigInt(rva);
  return { start, end: start + BigInt(size) };
}

function checkedSymbol(profile: Profile, image: PeImage, name: string): number {
  const rva = profile.symbol(name);
  if (rva < image.sizeOfImage) return rva;
  throw new MemtablesError('PROFILE_INVALID', `symbol ${name} lies outside the kernel image`, {
    remedy: 'Make the profile again from the PDB of this kernel.',
    context: { symbol: name, rva, sizeOfImage: image.sizeOfImage, profile: profile.source },
  });
}

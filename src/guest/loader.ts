import { MemtablesError } from '../errors.js';
import type { Machine } from '../machine/machine.js';
import { ExportTable } from '../nt/exports.js';
import { PeImage } from '../nt/pe.js';
import { nextRandom } from '../random.js';
import {
  type Gfn,
  type Gpa,
  type Gva,
  gpaOfFrame,
  PAGE_SHIFT,
  PAGE_SIZE,
  pageOffset,
} from '../vmi/address.js';
import type { Registers } from '../x86/registers.js';
import { type LaidOutImage, layOutImage } from './image.js';
import { bindImports } from './imports.js';
import type { GuestModule } from './lexer-module.js';
import { type PageRights, PageTableBuilder } from './page-tables.js';

export interface GuestOptions {
  /** `ntoskrnl.exe` as the set-up built it. */
  readonly image: Buffer;
  /** `hal.dll`, which the kernel imports from, as the set-up built it. */
  readonly hal: Buffer;
  /** Chooses the kernel base, the physical placement and the workload; 32 bits. */
  readonly seed: number;
  /** Loaded besides the kernel; its lexer reads the text over and over: at least one piece, and only whole ones. */
  readonly module?: Pick<GuestModule, 'image' | 'languageFunction'> & { readonly text: Uint8Array };
  /**
   * The guest reads its images by no instruction that reads memory more than once or on two pages: a hypervisor without
   * single step cannot show other bytes to those.
   */
  readonly simpleReads?: boolean;
}

/** What a guest is put into. */
export interface GuestTarget extends Pick<Machine, 'vcpuCount' | 'memoryBytes' | 'writePhysical'> {
  /**
   * A page of code by which the processors come to their entry point: the guest leaves its frame alone, and maps it
   * where it lies in physical memory.
   */
  readonly startFrame?: Gfn;
  setRegisters(vcpu: number, registers: EntryRegisters): void;
}

/** What a processor has when it enters the kernel. */
export type EntryRegisters = Pick<
  Registers,
  'cr0' | 'cr3' | 'cr4' | 'efer' | 'rflags' | 'rip' | 'rsp' | 'rcx' | 'rdx'
>;

/** Each piece of the lexer's text is compared for itself: so short that one ends soon where every switch is a trap. */
export const LEXER_PIECE_BYTES = 512;
const CHECKSUM_BYTES = 4;

export interface LoadedImage {
  readonly base: Gva;
  readonly size: number;
}

/** Where a guest was put. */
export interface LoadedGuest {
  readonly kernelBase: Gva;
  readonly imageSize: number;
  /** CR3 of the System process. */
  readonly directoryTable: Gpa;
  readonly seed: number;
  readonly vcpuCount: number;
  /** What the host and the guest's platform layer hand each other (native/guest/guest.inc). */
  readonly bootBlock: Gva;
  readonly hal: LoadedImage;
  readonly module?: LoadedImage;
  /** Translates an address of an image, the low alias, the pool, a kernel stack, the boot block or the text. */
  translate(gva: Gva): Gpa | undefined;
}

/** The fields of the boot block, by native/guest/guest.inc. */
export const BOOT_BLOCK = {
  processors: 0x00,
  systemCr3: 0x08,
  userCr3: 0x10,
  pool: 0x18,
  poolEnd: 0x20,
  stacks: 0x28,
  stacksEnd: 0x30,
  userCode: 0x38,
  userCodeAlias: 0x40,
  userStack: 0x48,
  lowAlias: 0x50,
  seed: 0x58,
  report: 0x60,
  hal: 0x68,
  module: 0x70,
  language: 0x78,
  text: 0x80,
  textPieces: 0x88,
  pieceBytes: 0x90,
  checksums: 0x98,
  simpleReads: 0xa0,
} as const;

/** By this name the kernel imports from it. */
const HAL = 'hal.dll';
const PAGE = BigInt(PAGE_SIZE);
const SEED_LIMIT = 2 ** 32;
/** Spreads seeds that differ in a bit; also keeps 0 from being the generator's dead state. */
const PLACEMENT_SALT = 0x6d2b79f5;

// Where NT keeps such things; each is moved by the seed inside its own part of the address space.
const KERNEL_REGION = { start: 0xffff_f800_0000_0000n, step: 0x20_0000n, steps: 0x4000 };
const POOL_REGION = { start: 0xffff_8000_0000_0000n, step: 0x4000_0000n, steps: 0x100 };
const STACK_REGION = { start: 0xffff_f500_0000_0000n, step: 0x4000_0000n, steps: 0x100 };
const USER_CODE_REGION = { start: 0x7ff6_0000_0000n, step: 0x1_0000n, steps: 0x4000 };
const USER_STACK_REGION = { start: 0x0050_0000_0000n, step: 0x1_0000n, steps: 0x4000 };
// Above the kernel's base, whose image ends well before them: within reach of a near jump.
const HAL_REGION = { start: 0x400_0000n, step: 0x1_0000n, steps: 0x400 };
const MODULE_REGION = { start: 0x1000_0000n, step: 0x1_0000n, steps: 0x4000 };
const LOW_ALIAS_REGION = { start: 0x1000_0000n, step: 0x10_0000n, steps: 0x100 };

/** A guard page that is not mapped, then the 24 KB of a kernel stack. */
const STACK_PAGES = 6;
const STACK_SLOT_PAGES = STACK_PAGES + 1;
/** Idle, DPC, ISR, three interrupt stacks of the TSS, two workers. */
const STACKS_PER_VCPU = 8;
/** Checker, look-alikes, user thread. */
const SINGLE_STACKS = 3;
/** Of the lexer. */
const MODULE_STACKS = 1;
/** KPCR, TSS, GDT, thread objects. */
const POOL_PAGES_PER_VCPU = 16;
/** IDT, processes, modules, single threads; the copies of the images come on top. */
const POOL_PAGES = 16;
const USER_STACK_PAGES = 2;

/** What a processor in long mode has, with nothing else set. */
export const LONG_MODE = {
  cr0: 0x8005_0033n, // PE MP ET NE WP AM PG
  cr4: 0x6a0n, // PAE PGE OSFXSR OSXMMEXCPT
  efer: 0xd00n, // LME LMA NXE
  rflags: 2n,
} as const satisfies Partial<EntryRegisters>;

/**
 * Places the images into the target and every vCPU at its entry point.
 *
 * @throws MemtablesError `IMAGE_INVALID`, or `INVALID_ARGUMENT` when the target has too little memory or the
 * seed is not a 32-bit number
 */
export function loadGuest(target: GuestTarget, options: GuestOptions): LoadedGuest {
  const { image: file, hal, seed, module, simpleReads = false } = options;
  if (!Number.isInteger(seed) || seed < 0 || seed >= SEED_LIMIT) {
    throw new MemtablesError('INVALID_ARGUMENT', `${seed} is no seed`, {
      remedy: 'Use a whole number from 0 to 4294967295.',
      context: { seed },
    });
  }
  const image = layOutImage(file);
  const placement = new Placement(target, seed);
  const kernelBase = placement.choose(KERNEL_REGION);
  const loadedHal = loadHal(placement, kernelBase, hal);
  bindToHal(file, image, hal, loadedHal.base);
  const imageFrames = placement.mapImage(kernelBase, image);
  const lowAlias = placement.choose(LOW_ALIAS_REGION);
  imageFrames.forEach((frame, page) => {
    placement.map(lowAlias + BigInt(page) * PAGE, frame, {});
  });

  const loadedModule = module && loadModule(placement, kernelBase, module);

  const copiedBytes = image.bytes.length + loadedHal.size + (loadedModule?.size ?? 0);
  const poolPages = copiedBytes / PAGE_SIZE + POOL_PAGES + POOL_PAGES_PER_VCPU * target.vcpuCount;
  const pool = placement.choose(POOL_REGION);
  placement.mapZeroed(pool, poolPages);
  const poolEnd = pool + BigInt(poolPages) * PAGE;

  const slots = STACKS_PER_VCPU * target.vcpuCount + SINGLE_STACKS + (module ? MODULE_STACKS : 0);
  const stacks = placement.choose(STACK_REGION);
  const slotBytes = BigInt(STACK_SLOT_PAGES) * PAGE;
  for (let slot = 0n; slot < slots; slot++) {
    placement.mapZeroed(stacks + slot * slotBytes + PAGE, STACK_PAGES);
  }

  const bootBlock = poolEnd + PAGE;
  placement.mapZeroed(bootBlock, 1);
  const userCodeFrame = placement.takeZeroedFrame();
  const userCodeAlias = bootBlock + 2n * PAGE;
  placement.map(userCodeAlias, userCodeFrame, { write: true });

  const text = userCodeAlias + 2n * PAGE;
  const textBytes = module?.text.length ?? 0;
  placement.mapBytes(text, module?.text ?? new Uint8Array());
  const textPieces = Math.floor(textBytes / LEXER_PIECE_BYTES);
  const checksums = text + BigInt(Math.ceil(textBytes / PAGE_SIZE) + 1) * PAGE;
  placement.mapZeroed(checksums, Math.ceil((textPieces * CHECKSUM_BYTES) / PAGE_SIZE));

  const userCr3 = placement.createProcess();
  const userCode = placement.choose(USER_CODE_REGION);
  const userStack = placement.choose(USER_STACK_REGION);
  placement.mapUser(userCr3, userCode, userCodeFrame, { execute: true });
  for (let page = 0n; page < USER_STACK_PAGES; page++) {
    placement.mapUser(userCr3, userStack + page * PAGE, placement.takeZeroedFrame(), { write: true });
  }
  placement.writeTables();

  const guest: LoadedGuest = {
    kernelBase,
    imageSize: image.bytes.length,
    directoryTable: placement.systemCr3,
    seed,
    vcpuCount: target.vcpuCount,
    bootBlock,
    hal: loadedHal,
    ...(loadedModule && { module: loadedModule }),
    translate: (gva) => placement.translate(gva),
  };
  const fields: Record<keyof typeof BOOT_BLOCK, bigint> = {
    processors: BigInt(target.vcpuCount),
    systemCr3: placement.systemCr3,
    userCr3,
    pool,
    poolEnd,
    stacks,
    stacksEnd: stacks + BigInt(slots) * slotBytes,
    userCode,
    userCodeAlias,
    userStack: userStack + BigInt(USER_STACK_PAGES) * PAGE,
    lowAlias,
    seed: BigInt(seed),
    report: 0n,
    hal: loadedHal.base,
    module: loadedModule?.base ?? 0n,
    language: loadedModule?.language ?? 0n,
    text,
    textPieces: BigInt(textPieces),
    pieceBytes: BigInt(LEXER_PIECE_BYTES),
    checksums,
    simpleReads: BigInt(simpleReads),
  };
  const block = Buffer.alloc(PAGE_SIZE);
  for (const [name, offset] of Object.entries(BOOT_BLOCK)) {
    block.writeBigUInt64LE(fields[name as keyof typeof BOOT_BLOCK], offset);
  }
  target.writePhysical(placement.translate(bootBlock)!, block);

  for (let vcpu = 0; vcpu < target.vcpuCount; vcpu++) {
    target.setRegisters(vcpu, {
      cr3: placement.systemCr3,
      ...LONG_MODE,
      rip: kernelBase + BigInt(image.entryPoint),
      rsp: stacks + BigInt(vcpu + 1) * slotBytes,
      rcx: bootBlock,
      rdx: BigInt(vcpu),
    });
  }
  return guest;
}

function loadHal(placement: Placement, kernelBase: Gva, file: Buffer): LoadedImage {
  const image = layOutImage(file);
  const base = kernelBase + placement.choose(HAL_REGION);
  placement.mapImage(base, image);
  return { base, size: image.bytes.length };
}

/** Has the kernel's image call the HAL where it lies. */
function bindToHal(file: Buffer, image: LaidOutImage, hal: Buffer, base: Gva): void {
  const exports = ExportTable.read(PeImage.fromFile(hal));
  bindImports(PeImage.fromFile(file), image.bytes, (from, name) => {
    if (from === HAL) return base + BigInt(exports.rvaOf(name));
    throw new MemtablesError('IMAGE_INVALID', `the guest's kernel imports from ${from}`, {
      remedy: 'Build the guest again with `npm run setup`.',
      context: { file: from },
    });
  });
}

interface LoadedModule extends LoadedImage {
  readonly language: Gva;
}

function loadModule(
  placement: Placement,
  kernelBase: Gva,
  module: NonNullable<GuestOptions['module']>,
): LoadedModule {
  const image = layOutImage(module.image);
  const base = kernelBase + placement.choose(MODULE_REGION);
  placement.mapImage(base, image);
  const language = ExportTable.read(PeImage.fromFile(module.image)).rvaOf(module.languageFunction);
  return {
    base,
    size: image.bytes.length,
    language: base + BigInt(language),
  };
}

/** Adds the distance from the preferred base to every address in the image. */
function relocate(image: LaidOutImage, base: Gva): void {
  const distance = base - image.preferredBase;
  for (const rva of image.relocations) {
    const value = image.bytes.readBigUInt64LE(rva) + distance;
    image.bytes.writeBigUInt64LE(BigInt.asUintN(64, value), rva);
  }
}

/** The headers and what lies between sections can only be read. */
function rightsOf(image: LaidOutImage, rva: number): PageRights {
  return image.sections.find((section) => rva >= section.rva && rva < section.rva + section.size) ?? {};
}

/** Where everything goes: frames in an order of the seed's, addresses by region, page tables as needed. */
class Placement {
  readonly systemCr3: Gpa;
  readonly #frames: Uint32Array;
  readonly #tables: PageTableBuilder;
  /** The System process's mappings, by page. */
  readonly #mapped = new Map<bigint, bigint>();
  #random: number;
  #taken = 0;

  constructor(
    private readonly target: GuestTarget,
    seed: number,
  ) {
    this.#random = (seed ^ PLACEMENT_SALT) >>> 0 || PLACEMENT_SALT;
    // Frame 0 is left out: a null GPA must stay a mistake.
    this.#frames = Uint32Array.from(
      { length: target.memoryBytes / PAGE_SIZE - 1 },
      (_, index) => index + 1,
    ).filter((frame) => BigInt(frame) !== target.startFrame);
    this.#tables = new PageTableBuilder(() => this.takeFrame());
    this.systemCr3 = this.#tables.createRoot();
    if (target.startFrame !== undefined) {
      this.map(gpaOfFrame(target.startFrame), target.startFrame, { execute: true });
    }
  }

  choose(region: { readonly start: bigint; readonly step: bigint; readonly steps: number }): Gva {
    return region.start + BigInt(this.#below(region.steps)) * region.step;
  }

  /** A frame that nothing else uses. */
  takeFrame(): bigint {
    const left = this.#frames.length - this.#taken;
    if (left === 0) {
      throw new MemtablesError('INVALID_ARGUMENT', 'the guest does not fit into its memory', {
        remedy: 'Give the machine more memory, or fewer vCPUs.',
        context: { memoryBytes: this.target.memoryBytes, vcpus: this.target.vcpuCount },
      });
    }
    const at = this.#taken + this.#below(left);
    const frame = this.#frames[at]!;
    this.#frames[at] = this.#frames[this.#taken]!;
    this.#taken++;
    return BigInt(frame);
  }

  takeZeroedFrame(): bigint {
    const frame = this.takeFrame();
    this.target.writePhysical(gpaOfFrame(frame), Buffer.alloc(PAGE_SIZE));
    return frame;
  }

  map(gva: Gva, frame: bigint, rights: PageRights): void {
    this.#tables.map(this.systemCr3, gva, frame, rights);
    this.#mapped.set(gva >> PAGE_SHIFT, frame);
  }

  /** Returns the frames, one for each page. */
  mapImage(base: Gva, image: LaidOutImage): bigint[] {
    relocate(image, base);
    return this.mapBytes(base, image.bytes, (offset) => rightsOf(image, offset));
  }

  /** In whole pages, read-only unless `rights` gives more to the one at an offset; returns the frames. */
  mapBytes(gva: Gva, bytes: Uint8Array, rights: (offset: number) => PageRights = () => ({})): bigint[] {
    return Array.from({ length: Math.ceil(bytes.length / PAGE_SIZE) }, (_, page) => {
      const frame = this.takeZeroedFrame();
      const offset = page * PAGE_SIZE;
      this.target.writePhysical(gpaOfFrame(frame), bytes.subarray(offset, offset + PAGE_SIZE));
      this.map(gva + BigInt(offset), frame, rights(offset));
      return frame;
    });
  }

  mapZeroed(gva: Gva, pages: number): void {
    for (let page = 0n; page < pages; page++) {
      this.map(gva + page * PAGE, this.takeZeroedFrame(), { write: true });
    }
  }

  /** An address space with the kernel in its upper half; nothing new may be mapped in a new part of that half. */
  createProcess(): Gpa {
    const root = this.#tables.createRoot();
    this.#tables.shareKernelHalf(this.systemCr3, root);
    return root;
  }

  mapUser(root: Gpa, gva: Gva, frame: bigint, rights: PageRights): void {
    this.#tables.map(root, gva, frame, { ...rights, user: true });
  }

  writeTables(): void {
    for (const { gpa, bytes } of this.#tables.contents()) this.target.writePhysical(gpa, bytes);
  }

  translate(gva: Gva): Gpa | undefined {
    const frame = this.#mapped.get(gva >> PAGE_SHIFT);
    return frame === undefined ? undefined : gpaOfFrame(frame) + BigInt(pageOffset(gva));
  }

  #below(limit: number): number {
    this.#random = nextRandom(this.#random);
    return this.#random % limit;
  }
}

import { type ErrorCode, MemtablesError } from '../errors.js';
import { firstIndex } from '../first-index.js';
import { type Gva, PAGE_SIZE } from '../vmi/address.js';
import { importedFiles } from './imports.js';
import type { GvaRange, Kernel } from './kernel.js';
import { KernelImage, type MappedReader, readImage } from './kernel-image.js';
import { loadedModules, type Module } from './modules.js';

/** The list is not read again sooner than this. */
const LIST_INTERVAL_MS = 1000;
/** A hostile list must not fill our memory; all modules of a guest have a few hundred MB, those that are hooked few. */
const MAX_HELD_BYTES = 256 * 1024 * 1024;
const IN_MID_CHANGE: ReadonlySet<ErrorCode> = new Set(['GUEST_STRUCTURE_INVALID', 'GUEST_MEMORY_UNMAPPED']);
const UNREADABLE: ReadonlySet<ErrorCode> = new Set([
  'IMAGE_INVALID',
  'GUEST_UNSUPPORTED',
  'GUEST_MEMORY_UNMAPPED',
]);

/**
 * The images whose code runs in the kernel: NT's own, and those of the modules that it has loaded. A module's is read
 * when it is first needed.
 */
export class KernelImages {
  /** By address, never overlapping, without NT's own image. */
  #modules: readonly Module[] = [];
  readonly #images = new Map<Module, KernelImage | 'unreadable'>();
  #listedAt = Number.NEGATIVE_INFINITY;
  #isListDoubted = false;

  /**
   * @param readOriginal reads guest memory without what we have changed
   * @throws MemtablesError `IMAGE_INVALID` when NT's functions are not known; `SYMBOL_NOT_FOUND`, `PROFILE_INVALID`
   */
  constructor(
    readonly nt: Kernel,
    private readonly readOriginal: MappedReader,
  ) {
    void nt.functions;
    this.refresh();
  }

  /** How many modules there are besides NT. */
  get moduleCount(): number {
    return this.#modules.length;
  }

  /** NT's image, and those of modules that have been needed. */
  inUse(): KernelImage[] {
    const modules = [...this.#images.values()];
    return [this.nt, ...modules.filter((image) => image !== 'unreadable')];
  }

  /** Where the image lies that has a byte at `gva`. To be asked for every violation. */
  rangeAt(gva: Gva): GvaRange | undefined {
    if (this.nt.contains(gva)) return { start: this.nt.base, end: this.nt.end };
    const module = this.#moduleAt(gva);
    return module && { start: module.base, end: endOf(module) };
  }

  /**
   * The image that has a byte at `gva`. A module of a session, whose memory the System process does not have, or one
   * that is damaged, is `unreadable`.
   */
  at(gva: Gva): KernelImage | 'unreadable' | undefined {
    if (this.nt.contains(gva)) return this.nt;
    const module = this.#moduleAt(gva);
    return module && this.#imageOf(module);
  }

  /** The image of the module with this file name, which may lack its extension; case does not matter. */
  named(name: string): KernelImage | 'unreadable' | undefined {
    const wanted = name.toLowerCase();
    if (wanted === this.nt.name) return this.nt;
    const module = this.#modules.find((each) => {
      const file = each.name.toLowerCase();
      return file === wanted || file.replace(/\.[^.]*$/, '') === wanted;
    });
    return module && this.#imageOf(module);
  }

  /** The images that are never unloaded: NT's, and those that it imports from itself. */
  permanent(): [nt: KernelImage, ...others: KernelImage[]] {
    const imported = namesOfImports(this.nt).map((name) => this.named(name));
    return [this.nt, ...imported.filter((image) => image instanceof KernelImage)];
  }

  /** Whether the image still lies where it did: a module may have been unloaded, and another one loaded there. */
  isCurrent(image: KernelImage): boolean {
    return image === this.nt || this.#hasHeadersOf(image);
  }

  #hasHeadersOf({ base, image }: KernelImage): boolean {
    const length = Math.min(image.sizeOfHeaders, PAGE_SIZE);
    const headers = this.readOriginal(base, length);
    return headers !== undefined && Buffer.compare(headers, image.read(0, length)) === 0;
  }

  /** Code runs that is in no image known: the list is to be read again. */
  doubtList(): void {
    this.#isListDoubted = true;
  }

  /** True when the list is to be read again, and has not been for a while. */
  get isRefreshDue(): boolean {
    return this.#isListDoubted && performance.now() - this.#listedAt >= LIST_INTERVAL_MS;
  }

  /** Reads the list again; keeps what is known where it does not add up, as in the middle of a change. */
  refresh(): void {
    this.#isListDoubted = false;
    this.#listedAt = performance.now();
    let listed: Module[];
    try {
      listed = [...loadedModules(this.nt)];
    } catch (error) {
      if (error instanceof MemtablesError && IN_MID_CHANGE.has(error.code)) return;
      throw error;
    }
    this.#modules = disjoint(this.nt, listed).map((module) => {
      const known = this.#moduleAt(module.base);
      return known !== undefined && isSame(known, module) && this.#isStillCurrent(known) ? known : module;
    });
    for (const module of this.#images.keys()) {
      if (!this.#modules.includes(module)) this.#images.delete(module);
    }
  }

  /** False for a module whose image has been read and is another now. */
  #isStillCurrent(module: Module): boolean {
    const image = this.#images.get(module);
    return image === undefined || image === 'unreadable' || this.isCurrent(image);
  }

  #moduleAt(gva: Gva): Module | undefined {
    const module = this.#modules[firstIndex(this.#modules, (each) => endOf(each) > gva)];
    return module !== undefined && module.base <= gva ? module : undefined;
  }

  #imageOf(module: Module): KernelImage | 'unreadable' {
    const known = this.#images.get(module);
    if (known !== undefined) return known;
    const image = this.#readImage(module) ?? 'unreadable';
    this.#images.set(module, image);
    return image;
  }

  #readImage({ name, base, size }: Module): KernelImage | undefined {
    if (this.#heldBytes() + size > MAX_HELD_BYTES) return undefined;
    try {
      const { image, holes } = readImage(this.readOriginal, base);
      if (image.sizeOfImage > size) return undefined;
      const read = new KernelImage(name, base, image, holes);
      // What cannot be told into functions cannot be worked with.
      void read.functions;
      return read;
    } catch (error) {
      if (error instanceof MemtablesError && UNREADABLE.has(error.code)) return undefined;
      throw error;
    }
  }

  #heldBytes(): number {
    return [...this.#images.values()].reduce(
      (sum, image) => sum + (image === 'unreadable' ? 0 : image.image.sizeOfImage),
      0,
    );
  }
}

/** None where Windows has discarded what names them. */
function namesOfImports({ image }: Kernel): string[] {
  try {
    return importedFiles(image);
  } catch (error) {
    if (error instanceof MemtablesError && error.code === 'IMAGE_INVALID') return [];
    throw error;
  }
}

/** Without those that overlap NT, which is one of them, or an earlier one. */
function disjoint(nt: Kernel, modules: readonly Module[]): Module[] {
  const result: Module[] = [];
  for (const module of [...modules].sort((a, b) => (a.base < b.base ? -1 : 1))) {
    const overlapsNt = module.base < nt.end && endOf(module) > nt.base;
    const last = result.at(-1);
    if (!overlapsNt && (last === undefined || endOf(last) <= module.base)) result.push(module);
  }
  return result;
}

function isSame(one: Module, other: Module): boolean {
  return one.name === other.name && one.base === other.base && one.size === other.size;
}

function endOf({ base, size }: Module): Gva {
  return base + BigInt(size);
}

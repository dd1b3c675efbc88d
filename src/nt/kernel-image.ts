import { MemtablesError } from '../errors.js';
import { type Gva, hex, PAGE_SIZE } from '../vmi/address.js';
import { ExportTable } from './exports.js';
import { FunctionTable } from './pdata.js';
import { PeImage } from './pe.js';
import { isPageable } from './sections.js';

/** NT itself has about 12 MB, the largest drivers, those of graphics cards, about 60 MB. */
export const MAX_IMAGE_BYTES = 64 * 1024 * 1024;

/** What NT's own image is called. */
export const NT = 'nt';

/** An image whose code runs in the kernel: NT's own, or that of a module. */
export class KernelImage {
  private exportTable: ExportTable | undefined;
  private functionTable: FunctionTable | undefined;
  private sortedExports: number[] | undefined;

  constructor(
    /** `NT`, or the module's file name. */
    readonly name: string,
    readonly base: Gva,
    /** The image as it was when it was read. */
    readonly image: PeImage,
    /** The pages that were not there then (discarded or paged out), as RVAs; they read as zeros. */
    readonly holes: ReadonlySet<number>,
  ) {}

  get end(): Gva {
    return this.base + BigInt(this.image.sizeOfImage);
  }

  contains(gva: Gva): boolean {
    return gva >= this.base && gva < this.end;
  }

  gva(rva: number): Gva {
    return this.base + BigInt(rva);
  }

  /** The exported functions and data. @throws MemtablesError `IMAGE_INVALID` */
  get exports(): ExportTable {
    this.exportTable ??= ExportTable.read(this.image);
    return this.exportTable;
  }

  /** @throws MemtablesError `IMAGE_INVALID` */
  get functions(): FunctionTable {
    this.functionTable ??= FunctionTable.read(this.image);
    return this.functionTable;
  }

  /** The RVA of a name that the image exports. @throws MemtablesError `SYMBOL_NOT_FOUND`, `IMAGE_INVALID` */
  symbolRva(name: string): number {
    return this.exports.rvaOf(name);
  }

  /** The RVA of the next name behind `rva`; `undefined` where there is none. @throws MemtablesError `IMAGE_INVALID` */
  symbolAfter(rva: number): number | undefined {
    this.sortedExports ??= [...this.exports.entries()].map(([, at]) => at).sort((a, b) => a - b);
    return this.sortedExports.find((at) => at > rva);
  }
}

/** Reads guest memory; `undefined` where a part is not mapped. */
export type MappedReader = (gva: Gva, length: number) => Uint8Array | undefined;

/** The size in bytes of the PE64 image at `base`, 0 if there is none: data may well look like an MZ header. */
export function imageSize(read: MappedReader, base: Gva): number {
  try {
    const { sizeOfImage } = PeImage.fromMemory(
      (rva, length) => read(base + BigInt(rva), length) ?? new Uint8Array(0),
    );
    return sizeOfImage <= MAX_IMAGE_BYTES ? sizeOfImage : 0;
  } catch (error) {
    if (error instanceof MemtablesError && NOT_AN_IMAGE.has(error.code)) return 0;
    throw error;
  }
}

const NOT_AN_IMAGE: ReadonlySet<string> = new Set(['IMAGE_INVALID', 'GUEST_UNSUPPORTED']);

/**
 * Copies the whole image at `base`, so that everything derived from it fits together.
 *
 * @throws MemtablesError `IMAGE_INVALID` when it is damaged, or when more is missing than what the kernel itself
 *   discards or pages out; `GUEST_UNSUPPORTED`
 */
export function readImage(read: MappedReader, base: Gva): { image: PeImage; holes: ReadonlySet<number> } {
  const size = imageSize(read, base);
  const copy = Buffer.alloc(Math.ceil(size / PAGE_SIZE) * PAGE_SIZE);
  const holes = new Set<number>();
  for (let rva = 0; rva < copy.length; rva += PAGE_SIZE) {
    const page = read(base + BigInt(rva), PAGE_SIZE);
    if (page !== undefined) copy.set(page, rva);
    else holes.add(rva);
  }
  const image = PeImage.fromMemory((rva, length) => copy.subarray(rva, rva + length));
  checkHoles(image, holes, base);
  return { image, holes };
}

function checkHoles(image: PeImage, holes: ReadonlySet<number>, base: Gva): void {
  for (const section of image.sections) {
    if (section.discardable || isPageable(section)) continue;
    const { name, rva, virtualSize } = section;
    for (let page = rva - (rva % PAGE_SIZE); page < rva + virtualSize; page += PAGE_SIZE) {
      if (!holes.has(page)) continue;
      throw new MemtablesError(
        'IMAGE_INVALID',
        `this is a kernel image we cannot read whole: section ${name} has no page at ${hex(base + BigInt(page))}`,
        {
          remedy: 'Try again when the guest has finished booting; a guest that hides its kernel is refused.',
          context: { section: name, rva: page, base },
        },
      );
    }
  }
}

import type { LoadedGuest } from '../guest/loader.js';
import type { PhysicalMemory } from '../guest/report.js';
import type { PeImage } from '../nt/pe.js';
import { type Gva, hex, PAGE_SIZE } from '../vmi/address.js';

/** Mapped bytes of an image, in whole pages. */
export interface ImageRegion {
  /** Of the section; `headers` for what lies before the first. */
  readonly name: string;
  readonly rva: number;
  /** As guest memory has them, base64. */
  readonly bytes: string;
}

interface Placed {
  /** As `0x…`. */
  readonly base: string;
  /** Headers and non-writable sections with the slack behind them; pages that are not mapped are left out. */
  readonly regions: readonly ImageRegion[];
}

/** Of the kernel's image, of the HAL's, and of the module's, where there is one. */
export interface ImageSnapshot extends Placed {
  readonly hal: Placed;
  readonly module?: Placed;
}

type Image = Pick<PeImage, 'sizeOfHeaders' | 'sections'>;
type Guest = Pick<LoadedGuest, 'kernelBase' | 'hal' | 'module' | 'translate'>;

/** The bytes of the guest's images that must not change, as memory holds them: no cloak is applied. */
export function snapshotImages(
  memory: PhysicalMemory,
  guest: Guest,
  images: { readonly kernel: Image; readonly hal: Image; readonly module: Image | undefined },
): ImageSnapshot {
  const { kernel, hal, module } = images;
  return {
    ...snapshot(memory, guest, guest.kernelBase, kernel),
    hal: snapshot(memory, guest, guest.hal.base, hal),
    ...(guest.module && module && { module: snapshot(memory, guest, guest.module.base, module) }),
  };
}

function snapshot(memory: PhysicalMemory, guest: Pick<Guest, 'translate'>, base: Gva, image: Image): Placed {
  const fixed = image.sections.filter((section) => !section.writable);
  const parts = [
    { name: 'headers', rva: 0, size: image.sizeOfHeaders },
    ...fixed.map(({ name, rva, virtualSize }) => ({ name, rva, size: virtualSize })),
  ];
  const regions = parts.flatMap(({ name, rva, size }) => {
    const found: { name: string; rva: number; pages: Uint8Array[] }[] = [];
    for (let at = rva; at < rva + size; at += PAGE_SIZE) {
      const gpa = guest.translate(base + BigInt(at));
      if (gpa === undefined) continue;
      const last = found.at(-1);
      const page = memory.readPhysical(gpa, PAGE_SIZE);
      if (last && last.rva + last.pages.length * PAGE_SIZE === at) last.pages.push(page);
      else found.push({ name, rva: at, pages: [page] });
    }
    return found;
  });
  return {
    base: hex(base),
    regions: regions.map(({ name, rva, pages }) => ({
      name,
      rva,
      bytes: Buffer.concat(pages).toString('base64'),
    })),
  };
}

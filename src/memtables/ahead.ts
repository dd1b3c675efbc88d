import { KernelImage } from '../nt/kernel-image.js';
import type { KernelImages } from '../nt/kernel-images.js';
import type { Gva } from '../vmi/address.js';
import { Closure } from './closure.js';
import type { Recognisers } from './recognisers.js';

/** Bytes that are hidden now. */
export interface Place {
  readonly gva: Gva;
  readonly bytes: number;
}

/** What is to be relocated before it has trapped. */
export interface AheadPlan {
  /** That hold hidden bytes, or will. */
  readonly pages: readonly Gva[];
  /** The switches' loads of dwords, and their tables. */
  readonly loads: readonly { readonly rip: Gva; readonly table: Gva }[];
}

/** Finds what hidden bytes make trap, in whatever image of the kernel they are. */
export class Ahead {
  readonly #closures = new WeakMap<KernelImage, Closure>();

  constructor(
    private readonly images: KernelImages,
    private readonly recognisers: Recognisers,
  ) {
    // The whole image is gone through, for which no trapped vCPU is to wait: so far nothing is trapped.
    this.#closureOf(images.nt);
  }

  /**
   * What is new when these bytes are hidden.
   *
   * @param afterEach called after each function that was analysed: the guest may be waiting
   */
  plan(places: readonly Place[], afterEach: () => void): AheadPlan {
    const pages: Gva[] = [];
    const loads: { rip: Gva; table: Gva }[] = [];
    for (const { gva, bytes } of places) {
      const image = this.images.at(gva);
      if (!(image instanceof KernelImage)) continue;
      const begin = Number(gva - image.base);
      const extension = this.#closureOf(image).extend([{ begin, end: begin + bytes }], afterEach);
      pages.push(...extension.pages.map((rva) => image.gva(rva)));
      loads.push(
        ...extension.switches.map(({ rva, table }) => ({ rip: image.gva(rva), table: image.gva(table) })),
      );
    }
    return { pages, loads };
  }

  #closureOf(image: KernelImage): Closure {
    const closure = this.#closures.get(image) ?? new Closure(image.image, this.recognisers.of(image));
    this.#closures.set(image, closure);
    return closure;
  }
}

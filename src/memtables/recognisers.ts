import type { KernelImage } from '../nt/kernel-image.js';
import { SwitchRecogniser } from '../switches/table.js';

/** Trapped vCPUs stand still while a load is proven: no function of a kernel is larger. */
const MOST_FUNCTION_BYTES = 64 * 1024;

/** A recogniser for each image, with what it has found out so far. */
export class Recognisers {
  readonly #byImage = new WeakMap<KernelImage, SwitchRecogniser>();

  of(image: KernelImage): SwitchRecogniser {
    const recogniser =
      this.#byImage.get(image) ?? new SwitchRecogniser(image.image, image.functions, MOST_FUNCTION_BYTES);
    this.#byImage.set(image, recogniser);
    return recogniser;
  }
}

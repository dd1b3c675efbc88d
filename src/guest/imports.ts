import { DIRECTORY, type PeImage } from '../nt/pe.js';
import type { Gva } from '../vmi/address.js';

const DESCRIPTOR_BYTES = 20;
const DESCRIPTOR_NAME = 12;
const DESCRIPTOR_ADDRESSES = 16;
const SLOT_BYTES = 8;
/** In front of the name of an import. */
const HINT_BYTES = 2;

/**
 * Fills in the addresses of what an image imports, as the boot loader does.
 *
 * @param laidOut the image as it is going to be in memory
 * @param addressOf where a function of a file is
 * @throws MemtablesError `IMAGE_INVALID`, or what `addressOf` throws
 */
export function bindImports(
  image: PeImage,
  laidOut: Buffer,
  addressOf: (file: string, name: string) => Gva,
): void {
  const directory = image.directory(DIRECTORY.import);
  if (directory === undefined) return;
  for (let descriptor = directory.rva; ; descriptor += DESCRIPTOR_BYTES) {
    const nameRva = image.readU32(descriptor + DESCRIPTOR_NAME);
    if (nameRva === 0) return;
    const file = image.readName(nameRva, 'an imported file');
    const lookups = image.readU32(descriptor);
    const addresses = image.readU32(descriptor + DESCRIPTOR_ADDRESSES);
    for (let slot = 0; ; slot += SLOT_BYTES) {
      const hintRva = image.readU32(lookups + slot);
      if (hintRva === 0) break;
      const name = image.readName(hintRva + HINT_BYTES, 'an import');
      laidOut.writeBigUInt64LE(addressOf(file, name), addresses + slot);
    }
  }
}

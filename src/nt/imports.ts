import { DIRECTORY, imageInvalid, type PeImage, viewOf } from './pe.js';

/** IMAGE_IMPORT_DESCRIPTOR; one that is all zeros ends the table. */
const DESCRIPTOR_SIZE = 20;
const NAME = 12;
/** The kernel imports from about ten files, drivers from fewer. */
const MAX_FILES = 256;

/**
 * The files that an image imports from, by name.
 *
 * @throws MemtablesError `IMAGE_INVALID`
 */
export function importedFiles(image: PeImage): string[] {
  const directory = image.directory(DIRECTORY.import);
  if (directory === undefined) return [];
  const files: string[] = [];
  for (let rva = directory.rva; ; rva += DESCRIPTOR_SIZE) {
    const name = viewOf(image.read(rva, DESCRIPTOR_SIZE)).getUint32(NAME, true);
    if (name === 0) return files;
    if (files.length === MAX_FILES) throw imageInvalid(`it imports from more than ${MAX_FILES} files`);
    files.push(image.readName(name, 'an imported file'));
  }
}

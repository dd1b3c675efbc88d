import { MemtablesError } from '../../src/errors.js';
import { ExportTable } from '../../src/nt/exports.js';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage } from '../../src/nt/pe.js';
import { scanImage } from '../../src/switches/scan.js';

/** The errors that a damaged image may end in. */
const EXPECTED = new Set(['IMAGE_INVALID', 'GUEST_UNSUPPORTED']);

/** What `use` returns, or the code of its error; an error of another kind passes through. */
export function resultOrCode<T>(use: () => T): T | string {
  try {
    return use();
  } catch (error) {
    if (error instanceof MemtablesError && EXPECTED.has(error.code)) return error.code;
    throw error;
  }
}

/** Reads all that is read of an image anywhere. Returns whether there was an image. */
export function readEverything(bytes: Uint8Array): boolean {
  const image = resultOrCode(() => PeImage.fromFile(bytes));
  if (typeof image === 'string') return false;
  resultOrCode(() => image.pdb());
  resultOrCode(() => ExportTable.read(image));
  const functions = resultOrCode(() => FunctionTable.read(image));
  if (typeof functions !== 'string') {
    for (const entry of functions.entries.slice(0, 100)) {
      resultOrCode(() => functions.unwindInfo(entry));
      functions.fragmentsOf(entry);
    }
  }
  resultOrCode(() => scanImage(image));
  return true;
}

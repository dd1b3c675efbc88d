import { MemtablesError } from '../errors.js';
import { DIRECTORY, imageInvalid, type PeImage, viewOf } from './pe.js';

const DIRECTORY_SIZE = 40;
/** ntoskrnl.exe has about 3,000; ordinals are 16 bits wide. */
const MAX_EXPORTS = 65536;
/** Names are short: a hostile table that points all of them at one long string must not cost more. */
const MAX_NAME_BYTES = 4 << 20;

/** The exports of an image by name. */
export class ExportTable {
  private constructor(
    private readonly rvas: ReadonlyMap<string, number>,
    private readonly forwarders: ReadonlySet<string>,
  ) {}

  /** @throws MemtablesError `IMAGE_INVALID`; an image without exports has an empty table. */
  static read(image: PeImage): ExportTable {
    const directory = image.directory(DIRECTORY.export);
    if (directory === undefined) return new ExportTable(new Map(), new Set());
    const header = viewOf(image.read(directory.rva, DIRECTORY_SIZE));
    const [functionCount, nameCount, functionsRva, namesRva, ordinalsRva] = [20, 24, 28, 32, 36].map(
      (field) => header.getUint32(field, true),
    ) as [number, number, number, number, number];
    if (functionCount > MAX_EXPORTS || nameCount > MAX_EXPORTS) {
      throw imageInvalid('the export table has an impossible size', { functionCount, nameCount });
    }
    const functions = viewOf(image.read(functionsRva, functionCount * 4));
    const names = viewOf(image.read(namesRva, nameCount * 4));
    const ordinals = viewOf(image.read(ordinalsRva, nameCount * 2));

    const rvas = new Map<string, number>();
    const forwarders = new Set<string>();
    let nameBytes = 0;
    for (let index = 0; index < nameCount; index++) {
      const name = image.readName(names.getUint32(index * 4, true), 'an export');
      nameBytes += name.length;
      const ordinal = ordinals.getUint16(index * 2, true);
      if (ordinal >= functionCount || nameBytes > MAX_NAME_BYTES) {
        throw imageInvalid(`export ${name} has no place in the export table`, { name, ordinal });
      }
      const rva = functions.getUint32(ordinal * 4, true);
      if (rva >= image.sizeOfImage)
        throw imageInvalid(`export ${name} lies outside the image`, { name, rva });
      // An address inside the export directory is the text of a forwarder.
      if (rva >= directory.rva && rva < directory.rva + directory.size) forwarders.add(name);
      else if (rva !== 0) rvas.set(name, rva);
    }
    return new ExportTable(rvas, forwarders);
  }

  /** Names and addresses, without forwarders. */
  entries(): IterableIterator<[name: string, rva: number]> {
    return this.rvas.entries();
  }

  has(name: string): boolean {
    return this.rvas.has(name);
  }

  /** @throws MemtablesError `SYMBOL_NOT_FOUND`, also for a forwarder: its code is in another image. */
  rvaOf(name: string): number {
    const rva = this.rvas.get(name);
    if (rva !== undefined) return rva;
    const what = this.forwarders.has(name) ? 'is forwarded to another image' : 'is not exported';
    throw new MemtablesError('SYMBOL_NOT_FOUND', `${name} ${what}`, {
      remedy: 'Check the spelling, and which image the function is in.',
      context: { name },
    });
  }
}

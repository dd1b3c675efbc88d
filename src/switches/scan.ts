import { FunctionTable } from '../nt/pdata.js';
import type { PeImage, Section } from '../nt/pe.js';
import { SwitchRecogniser, type SwitchSite } from './table.js';

/** `8B /r` with a SIB byte and a 32-bit displacement: every dword load of a table looks like this. */
const MOV_LOAD = 0x8b;
const MODRM_MASK = 0b11000111;
const MODRM_SIB_DISP32 = 0b10000100;
const SIB_SCALE_MASK = 0b11000000;
const SIB_SCALE_4 = 0b10000000;
const LOAD_LENGTH = 7;
const CHUNK = 1 << 20;

/** Every load of an image from a switch's table among its code, in ascending order. */
export function scanImage(image: PeImage): SwitchSite[] {
  return [...switchesIn(image)].sort((a, b) => a.rva - b.rva);
}

/**
 * Every load of an image from a switch's table among its code, function by function: found, or refused with a reason.
 * Tables in other sections are left out: reads of them never trap.
 *
 * @param progress is told how many bytes of code have been looked at, again and again
 */
export function* switchesIn(
  image: PeImage,
  progress: (bytes: number) => void = () => {},
): Generator<SwitchSite> {
  const functions = FunctionTable.read(image);
  const recogniser = new SwitchRecogniser(image, functions);
  /** Where the functions and gaps begin that were looked at. */
  const analysed = new Set<number>();
  let before = 0;
  for (const section of image.sections) {
    if (!section.executable) continue;
    let looked = section.rva;
    for (const { rva, table } of likelyLoads(image, section)) {
      if (rva < looked || !isInCode(image, table)) continue;
      progress(before + rva - section.rva);
      const entry = functions.entryAt(rva);
      const around = entry ?? functions.gapAround(rva, section.rva, section.rva + section.virtualSize);
      looked = around.end;
      const start = entry === undefined ? around.begin : functions.startOf(entry);
      if (analysed.has(start)) continue;
      analysed.add(start);
      for (const site of recogniser.switchesAround(rva)) {
        if (site.table !== undefined && isInCode(image, site.table)) yield site;
      }
    }
    before += section.virtualSize;
  }
}

function isInCode(image: PeImage, table: number): boolean {
  return image.sectionAt(table)?.executable === true;
}

/** Bytes that look like a load of a table. */
export interface LikelyLoad {
  /** Of the opcode. */
  readonly rva: number;
  readonly table: number;
}

/** Where the bytes may be a table load: cheap, and never misses one. */
export function* likelyLoads(image: PeImage, section: Section): Generator<LikelyLoad> {
  for (let start = 0; start < section.virtualSize; start += CHUNK) {
    const length = Math.min(CHUNK + LOAD_LENGTH, section.virtualSize - start);
    const bytes = image.read(section.rva + start, length);
    for (let at = bytes.indexOf(MOV_LOAD); at !== -1 && at < CHUNK; at = bytes.indexOf(MOV_LOAD, at + 1)) {
      if (at + LOAD_LENGTH > length) break;
      const [modrm, sib] = [bytes[at + 1]!, bytes[at + 2]!];
      if ((modrm & MODRM_MASK) !== MODRM_SIB_DISP32 || (sib & SIB_SCALE_MASK) !== SIB_SCALE_4) continue;
      const view = new DataView(bytes.buffer, bytes.byteOffset + at + 3, 4);
      yield { rva: section.rva + start + at, table: view.getUint32(0, true) };
    }
  }
}

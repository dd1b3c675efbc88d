import type { Section } from '../nt/pe.js';
import { type Gva, PAGE_SIZE } from '../vmi/address.js';

/** Unused bytes at the end of a section's last page. */
export interface SlackRegion {
  readonly section: string;
  readonly gva: Gva;
  /** In bytes. */
  readonly size: number;
}

/** NT pages sections out, and frees or overwrites them, by the start of their names; whatever their flags say. */
const UNSTABLE_NAMES = ['PAGE', 'INIT'];
/** Mapped under the user page table too, where the rest of the image is not. */
const SHADOW_SECTION = 'KVASCODE';

/** True when code that is put into the section, or changed there, stays mapped and as it is while NT runs. */
export function holdsStableCode(
  section: Pick<Section, 'name' | 'executable' | 'writable' | 'discardable'>,
): boolean {
  return (
    section.executable &&
    !section.writable &&
    !section.discardable &&
    section.name !== SHADOW_SECTION &&
    !UNSTABLE_NAMES.some((prefix) => section.name.startsWith(prefix))
  );
}

/**
 * The slack of an image loaded at `imageBase`: for each section that holds stable code, the zero-filled bytes
 * at the very end of its last page, in the order of the sections.
 *
 * @param read returns guest memory; it is asked for bytes behind the sections' ends, on their last pages.
 */
export function findSlack(
  imageBase: Gva,
  sections: readonly Section[],
  read: (gva: Gva, length: number) => Uint8Array,
): SlackRegion[] {
  return sections.filter(holdsStableCode).flatMap((section) => {
    const start = section.rva + section.virtualSize;
    const pageEnd = Math.ceil(start / PAGE_SIZE) * PAGE_SIZE;
    const laterSections = sections.map(({ rva }) => rva).filter((rva) => rva >= start);
    const end = Math.min(pageEnd, ...laterSections);
    const tail = read(imageBase + BigInt(start), end - start);
    const zerosFrom = tail.findLastIndex((byte) => byte !== 0) + 1;
    const size = tail.length - zerosFrom;
    return size === 0 ? [] : [{ section: section.name, gva: imageBase + BigInt(start + zerosFrom), size }];
  });
}

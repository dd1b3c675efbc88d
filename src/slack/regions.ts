import type { Section } from '../nt/pe.js';
import { type Gva, PAGE_SIZE } from '../vmi/address.js';

/** Unused bytes at the end of a section's last page. */
export interface SlackRegion {
  readonly section: string;
  readonly gva: Gva;
  /** In bytes. */
  readonly size: number;
}

/** Why code that is put into a section, or changed there, may not stay mapped and as it is while NT runs. */
export type Instability =
  | 'not-executable'
  | 'writable'
  | 'discardable'
  | 'pageable'
  /** Freed or overwritten once the kernel, or its debugger, has started. */
  | 'initialisation-code'
  /** Mapped under the user page table too (KVASCODE), where the rest of the image is not. */
  | 'mapped-for-user-mode';

/** NT pages sections out, and frees or overwrites them, by the start of their names; whatever their flags say. */
const PAGEABLE_PREFIX = 'PAGE';
const INITIALISATION_PREFIX = 'INIT';
const SHADOW_SECTION = 'KVASCODE';

/** `undefined` when code can be changed in this section. */
export function instabilityOf(
  section: Pick<Section, 'name' | 'executable' | 'writable' | 'discardable'>,
): Instability | undefined {
  if (!section.executable) return 'not-executable';
  if (section.writable) return 'writable';
  if (section.discardable) return 'discardable';
  if (section.name.startsWith(PAGEABLE_PREFIX)) return 'pageable';
  if (section.name.startsWith(INITIALISATION_PREFIX)) return 'initialisation-code';
  return section.name === SHADOW_SECTION ? 'mapped-for-user-mode' : undefined;
}

/**
 * The slack of an image loaded at `imageBase`: for each section whose code can be changed, the zero-filled bytes
 * at the very end of its last page, in the order of the sections.
 *
 * @param read returns guest memory; it is asked for bytes behind the sections' ends, on their last pages.
 */
export function findSlack(
  imageBase: Gva,
  sections: readonly Section[],
  read: (gva: Gva, length: number) => Uint8Array,
): SlackRegion[] {
  const stable = sections.filter((section) => instabilityOf(section) === undefined);
  return stable.flatMap((section) => {
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

import type { Section } from './pe.js';

/** The kernel pages out those of its own sections that have these names, whatever their flags say. */
const PAGEABLE_PREFIX = 'PAGE';
const PAGEABLE_EXPORTS = '.edata';

/** True for a section of the kernel image whose pages may be absent because they are paged out. */
export function isPageable(section: Section): boolean {
  return section.name.startsWith(PAGEABLE_PREFIX) || section.name === PAGEABLE_EXPORTS;
}

import { type Gva, hex } from '../vmi/address.js';
import type { GuestMemory } from '../vmi/guest-memory.js';
import { kernelPointer, structureInvalid } from './structure.js';

/** LIST_ENTRY: Flink, then Blink. */
const FLINK = 0;
const BLINK = 8;
const LIST_ENTRY_SIZE = 16;

/**
 * The addresses of the entries of a circular LIST_ENTRY list, without its head, in order.
 *
 * Every link is checked against the back link of the entry it leads to, which leaves no room for a loop that
 * misses the head; `max` bounds a list that is merely absurdly long.
 *
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID`, `GUEST_MEMORY_UNMAPPED`
 */
export function* walkList(memory: GuestMemory, head: Gva, max: number, what: string): Generator<Gva> {
  let previous = head;
  let entry = readLinks(memory, head).flink;
  for (let count = 0; ; count++) {
    kernelPointer(entry, `a link of the list of ${what}`);
    const { flink, blink } = readLinks(memory, entry);
    if (blink !== previous) {
      throw structureInvalid(
        `the list of ${what} is broken: the entry at ${hex(entry)} leads back to ${hex(blink)}`,
        { head, entry, blink, expected: previous },
      );
    }
    if (entry === head) return;
    if (count === max) throw structureInvalid(`the list of ${what} has more than ${max} entries`, { head });
    yield entry;
    previous = entry;
    entry = flink;
  }
}

function readLinks(memory: GuestMemory, entry: Gva): { flink: Gva; blink: Gva } {
  const links = memory.read(entry, LIST_ENTRY_SIZE);
  return { flink: links.readBigUInt64LE(FLINK), blink: links.readBigUInt64LE(BLINK) };
}

import { MemtablesError } from '../errors.js';
import { type Gfn, type Gpa, gfnOf, gpaOfFrame, hex, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import type { HiddenPiece } from '../vmi/hypervisor.js';

/** A hidden piece, and whose it is. */
export interface Cloak<Owner> extends HiddenPiece {
  /** What the change belongs to. Compared by identity. */
  readonly owner: Owner;
}

/** A cloak that is in the map. */
export interface PlacedCloak<Owner> extends Cloak<Owner> {
  /** Offset on its page. */
  readonly first: number;
  /** What it was hidden with as `current`, which follows memory when the guest writes over it. */
  readonly put: Uint8Array;
}

/** Reads guest-physical memory as it is. */
export type PhysicalReader = (gpa: Gpa, length: number) => Uint8Array;

/** The longest answer to a violation that a hypervisor takes. */
export const MAX_ANSWER = 256;

/**
 * Everything that is hidden from the guest, by guest-physical address: whatever alias of a page the guest
 * reads through, it sees the original bytes.
 */
export class CloakMap<Owner> {
  /** The cloaks of each frame, which never overlap. A frame without one has no entry. */
  readonly #frames = new Map<Gfn, PlacedCloak<Owner>[]>();

  /**
   * Hides the bytes of `cloak`, all on one frame; `cloaksOfChange` splits a longer range.
   *
   * @throws MemtablesError `INVALID_ARGUMENT` when it is empty, crosses a page, overlaps another, or its bytes
   *   differ in length.
   */
  hide(cloak: Cloak<Owner>): void {
    const { gpa, original, current } = cloak;
    const length = original.length;
    if (length === 0 || current.length !== length || pageOffset(gpa) + length > PAGE_SIZE) {
      throw new MemtablesError('INVALID_ARGUMENT', `the cloak at ${hex(gpa)} is not one piece of one page`, {
        remedy: 'Split the range by page, with as many original as current bytes.',
        context: { gpa, original: length, current: current.length },
      });
    }
    const taken = this.#overlapping(gpa, length)[0];
    if (taken !== undefined) {
      throw new MemtablesError('INVALID_ARGUMENT', `the bytes at ${hex(taken.gpa)} are hidden already`, {
        remedy: 'Reveal the earlier cloak first.',
        context: { gpa, length, taken: taken.gpa, takenLength: taken.original.length },
      });
    }
    const frame = this.#frames.get(gfnOf(gpa)) ?? [];
    const own = {
      ...cloak,
      first: pageOffset(gpa),
      original: Uint8Array.from(original),
      current: Uint8Array.from(current),
      put: Uint8Array.from(current),
    };
    this.#frames.set(gfnOf(gpa), [...frame, own]);
  }

  /** Forgets all cloaks of `owner`. */
  reveal(owner: Owner): void {
    for (const [gfn, cloaks] of [...this.#frames]) {
      const rest = cloaks.filter((cloak) => cloak.owner !== owner);
      if (rest.length === cloaks.length) continue;
      if (rest.length > 0) this.#frames.set(gfn, rest);
      else this.#frames.delete(gfn);
    }
  }

  /** The cloaks of `owner`: write each one's `original` back to take the change out of the guest. */
  cloaksOf(owner: Owner): PlacedCloak<Owner>[] {
    return [...this.#frames.values()].flat().filter((cloak) => cloak.owner === owner);
  }

  /** The frames that hold a cloak: their reads and writes have to be trapped. */
  frames(): Gfn[] {
    return [...this.#frames.keys()];
  }

  /** The cloaks of one frame. */
  on(gfn: Gfn): readonly Cloak<Owner>[] {
    return this.#frames.get(gfn) ?? [];
  }

  isHidden(gpa: Gpa): boolean {
    return this.touches(gpa, 1);
  }

  /** True when any of these bytes is hidden. */
  touches(gpa: Gpa, length: number): boolean {
    const from = pageOffset(gpa);
    if (from + length > PAGE_SIZE) return this.#overlapping(gpa, length).length > 0;
    // Asked for every violation: on one page, offsets do.
    const cloaks = this.#frames.get(gfnOf(gpa));
    if (cloaks === undefined) return false;
    for (const { first, original } of cloaks) {
      if (Math.max(from, first) < Math.min(from + length, first + original.length)) return true;
    }
    return false;
  }

  /** What a reader must see of this range, of any length: memory, with the original bytes laid over it. */
  overlay(gpa: Gpa, length: number, read: PhysicalReader): Uint8Array {
    const bytes = new Uint8Array(read(gpa, length));
    for (const cloak of this.#overlapping(gpa, length)) {
      const { from, to } = intersection(cloak, gpa, length);
      bytes.set(
        cloak.original.subarray(Number(from - cloak.gpa), Number(to - cloak.gpa)),
        Number(from - gpa),
      );
    }
    return bytes;
  }

  /**
   * The answer to a read violation: what the reader must see from `gpa` on, to the end of the access or of
   * the page; `undefined` when memory itself is right.
   *
   * @param length of the access in bytes, if known. Without it the answer covers the longest possible one.
   */
  answer(gpa: Gpa, read: PhysicalReader, length = MAX_ANSWER): Uint8Array | undefined {
    const reach = Math.min(length, MAX_ANSWER, PAGE_SIZE - pageOffset(gpa));
    return this.touches(gpa, reach) ? this.overlay(gpa, reach, read) : undefined;
  }

  /**
   * After the guest has written to hidden bytes: what it wrote becomes the original.
   *
   * @param gpa where the write began, on its page.
   * @param length of the write on this page, if known. Without it only bytes that differ from what was put
   *   there count as written, up to the end of the page.
   * @returns the owners whose bytes the guest has overwritten; none when the write did not happen after all.
   */
  reconcile(gpa: Gpa, read: PhysicalReader, length?: number): Owner[] {
    const reach = Math.min(length ?? PAGE_SIZE, PAGE_SIZE - pageOffset(gpa));
    const touched = this.#overlapping(gpa, reach).map((cloak) => {
      const { from, to } = intersection(cloak, gpa, reach);
      const memory = read(from, Number(to - from));
      const first = Number(from - cloak.gpa);
      const changed = [...memory.keys()].filter((i) => memory[i] !== cloak.current[first + i]);
      return { cloak, first, memory, changed };
    });
    // A write that faulted on its second page, say, has left nothing behind.
    const happened = touched.some(({ changed }) => changed.length > 0);
    const owners = new Set<Owner>();
    for (const { cloak, first, memory, changed } of touched) {
      const written = length !== undefined && happened ? [...memory.keys()] : changed;
      if (written.length === 0) continue;
      for (const i of written) {
        cloak.original[first + i] = memory[i]!;
        cloak.current[first + i] = memory[i]!;
      }
      owners.add(cloak.owner);
    }
    return [...owners];
  }

  /** The cloaks with a byte in this range. */
  #overlapping(gpa: Gpa, length: number): Cloak<Owner>[] {
    const found: Cloak<Owner>[] = [];
    const end = gpa + BigInt(length);
    for (let gfn = gfnOf(gpa); gpaOfFrame(gfn) < end; gfn++) {
      for (const cloak of this.#frames.get(gfn) ?? []) {
        const { from, to } = intersection(cloak, gpa, length);
        if (from < to) found.push(cloak);
      }
    }
    return found;
  }
}

/** The part of a range that a cloak covers; empty, or even reversed, where it covers none. */
function intersection(cloak: Cloak<unknown>, gpa: Gpa, length: number): { from: Gpa; to: Gpa } {
  const end = gpa + BigInt(length);
  const cloakEnd = cloak.gpa + BigInt(cloak.original.length);
  return { from: cloak.gpa > gpa ? cloak.gpa : gpa, to: cloakEnd < end ? cloakEnd : end };
}

import type { CloakMap } from '../cloak/cloak-map.js';
import { cloaksOfChange } from '../cloak/pieces.js';
import type { Patch } from '../handlers/plan.js';
import type { Journal } from '../journal/journal.js';
import { type Gfn, type Gpa, type Gva, gfnOf, gpaOfFrame, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import type { GuestMemory } from '../vmi/guest-memory.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import type { InstructionCache } from '../x86/instruction-cache.js';

/** A change of guest code, in the guest or about to be. Its identity is the owner of its cloaks. */
export interface CodeChange {
  /** What it is, for a person: `handler of 0x…`, `entry of nt!Name`. */
  readonly label: string;
  readonly patch: Patch;
  /** Journal numbers, by the GPA of each page's piece. */
  readonly journalled: Map<Gpa, number>;
}

/**
 * Changes code of the guest and takes changes back: journalled before they are made, hidden from readers, on
 * trapped frames. To be used on a quiescent guest only.
 */
export class Patcher {
  /** Frames that are trapped, for as long as a cloak lies on them. */
  readonly #trapped = new Set<Gfn>();

  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly memory: GuestMemory,
    private readonly journal: Journal,
    private readonly cloaks: CloakMap<CodeChange>,
    /** Forgets what was decoded where code changes: no vCPU must be answered by what stood there before. */
    private readonly instructions: InstructionCache,
  ) {}

  /** A change that is not in the guest yet. */
  prepare(label: string, patch: Patch): CodeChange {
    return { label, patch, journalled: new Map() };
  }

  /**
   * Makes the change.
   *
   * @throws MemtablesError of the hypervisor or the journal; a part of it may be in the guest then: `revert` it
   */
  apply(change: CodeChange): void {
    const { label, patch } = change;
    const original = this.memory.read(patch.gva, patch.bytes.length);
    const cloaks = cloaksOfChange({ gva: patch.gva, original, current: patch.bytes, owner: change }, (gva) =>
      this.memory.translate(gva),
    );
    this.instructions.invalidate(patch.gva, patch.bytes.length);
    for (const cloak of cloaks) {
      const { gpa, original: before, current: after } = cloak;
      change.journalled.set(gpa, this.journal.record({ gpa, before, after, owner: label }));
      this.cloaks.hide(cloak);
      this.#trap(gfnOf(gpa));
      this.hypervisor.writePhysical(gpa, after);
    }
  }

  /**
   * Puts the original bytes back, those the guest has written itself included, and ends their hiding. Also of a
   * change of which only a part was made, or none.
   *
   * @throws MemtablesError of the hypervisor or the journal; call it again then
   */
  revert(change: CodeChange): void {
    this.instructions.invalidate(change.patch.gva, change.patch.bytes.length);
    for (const { gpa, original } of this.cloaks.cloaksOf(change)) {
      this.hypervisor.writePhysical(gpa, original);
      this.#forget(change, gpa);
    }
    // A piece that was journalled but never hidden was never written either.
    for (const gpa of [...change.journalled.keys()]) this.#forget(change, gpa);
    this.cloaks.reveal(change);
    this.#releaseUnneeded();
  }

  /**
   * What the guest's own code sees at a virtual address: memory, with all of our changes hidden; `undefined` where a part
   * is not mapped.
   */
  readOriginal(gva: Gva, length: number): Uint8Array | undefined {
    const bytes = Buffer.alloc(length);
    for (let done = 0; done < length; ) {
      const at = gva + BigInt(done);
      const piece = Math.min(PAGE_SIZE - pageOffset(at), length - done);
      if (!this.memory.isMapped(at)) return undefined;
      const seen = this.cloaks.overlay(this.memory.translate(at), piece, (gpa, size) =>
        this.hypervisor.readPhysical(gpa, size),
      );
      bytes.set(seen, done);
      done += piece;
    }
    return bytes;
  }

  /** As `reconcile`, for every hidden byte: which ones were written is not known. */
  reconcileAll(): CodeChange[] {
    return this.cloaks.frames().flatMap((gfn) => this.reconcile(gpaOfFrame(gfn), undefined));
  }

  /**
   * Takes note of guest writes to a hidden range: what the guest wrote is what `revert` puts back.
   *
   * @param length of the write on this page in bytes, if known
   * @returns the patches that the guest has written over
   */
  reconcile(gpa: Gpa, length: number | undefined): CodeChange[] {
    const overwritten = this.cloaks.reconcile(
      gpa,
      (at, size) => this.hypervisor.readPhysical(at, size),
      length,
    );
    for (const change of overwritten) {
      for (const cloak of this.cloaks.cloaksOf(change)) {
        const renewed = this.journal.record({
          gpa: cloak.gpa,
          before: cloak.original,
          after: cloak.current,
          owner: change.label,
        });
        this.#forget(change, cloak.gpa);
        change.journalled.set(cloak.gpa, renewed);
      }
    }
    return overwritten;
  }

  #trap(gfn: Gfn): void {
    if (this.#trapped.has(gfn)) return;
    this.hypervisor.trapAccess(gfn);
    this.#trapped.add(gfn);
  }

  #releaseUnneeded(): void {
    const needed = new Set(this.cloaks.frames());
    for (const gfn of this.#trapped) {
      if (needed.has(gfn)) continue;
      this.hypervisor.releaseAccess(gfn);
      this.#trapped.delete(gfn);
    }
  }

  #forget(change: CodeChange, gpa: Gpa): void {
    const id = change.journalled.get(gpa);
    if (id === undefined) return;
    this.journal.undone(id);
    change.journalled.delete(gpa);
  }
}

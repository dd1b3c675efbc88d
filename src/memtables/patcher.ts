import type { Cloak, CloakMap } from '../cloak/cloak-map.js';
import { cloaksOfChange } from '../cloak/pieces.js';
import type { Patch } from '../handlers/plan.js';
import type { Journal } from '../journal/journal.js';
import {
  type Gfn,
  type Gpa,
  type Gva,
  gfnOf,
  gpaOfFrame,
  PAGE_SIZE,
  pageBase,
  pageOffset,
} from '../vmi/address.js';
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
  /** Changes that the guest has written over. */
  readonly #overwritten = new WeakSet<CodeChange>();

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
    this.#takeBack(change, this.cloaks.cloaksOf(change));
  }

  /**
   * As `revert`, after the guest has unloaded what was changed: frames that it has used for something else since stay as
   * they are. Others may come back into use with what is in them.
   */
  revertUntouched(change: CodeChange): void {
    const isTouched = this.#overwritten.has(change);
    this.#takeBack(
      change,
      isTouched ? [] : this.cloaks.cloaksOf(change).filter((piece) => this.#isThere(piece)),
    );
  }

  /** False when the guest no longer has it where it was made: it has unmapped the code, or mapped something else. */
  isInPlace(change: CodeChange): boolean {
    const mapped = this.#framesOf(change.patch);
    const pieces = this.cloaks.cloaksOf(change);
    return pieces.every((piece) => mapped.has(gfnOf(piece.gpa)) && this.#isThere(piece));
  }

  #isThere({ gpa, current }: Cloak<CodeChange>): boolean {
    return Buffer.compare(this.hypervisor.readPhysical(gpa, current.length), current) === 0;
  }

  #takeBack(change: CodeChange, written: readonly Cloak<CodeChange>[]): void {
    this.instructions.invalidate(change.patch.gva, change.patch.bytes.length);
    for (const { gpa, original } of written) {
      this.hypervisor.writePhysical(gpa, original);
      this.#forget(change, gpa);
    }
    // A piece that was journalled but never hidden was never written either; or it is not ours any more.
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
      this.#overwritten.add(change);
      for (const cloak of this.cloaks.cloaksOf(change)) this.#renewJournal(change, cloak);
    }
    return overwritten;
  }

  /** False once `revert` has put every byte back, even if it failed after that. */
  isMade(change: CodeChange): boolean {
    return this.cloaks.cloaksOf(change).length > 0;
  }

  /** True when what is in memory is all the guest's. */
  isWhollyOverwritten(change: CodeChange): boolean {
    const pieces = this.cloaks.cloaksOf(change);
    return pieces.every(({ original, current }) => Buffer.compare(original, current) === 0);
  }

  /**
   * Makes a change again that the guest has written over, for as long as it cannot be reverted: no thread must execute
   * a mix of our bytes and the guest's. What the guest wrote stays what it sees, and what `revert` puts back.
   *
   * @throws MemtablesError of the hypervisor or the journal; call it again then
   */
  reassert(change: CodeChange): void {
    this.instructions.invalidate(change.patch.gva, change.patch.bytes.length);
    for (const cloak of this.cloaks.cloaksOf(change)) {
      const { gpa, current, put } = cloak;
      this.#renewJournal(change, { ...cloak, current: put });
      this.hypervisor.writePhysical(gpa, put);
      current.set(put);
    }
    // Where memory is as we left it, it is ours to take back again.
    this.#overwritten.delete(change);
  }

  #renewJournal(change: CodeChange, { gpa, original, current }: Cloak<CodeChange>): void {
    const renewed = this.journal.record({ gpa, before: original, after: current, owner: change.label });
    this.#forget(change, gpa);
    change.journalled.set(gpa, renewed);
  }

  /** The frames that are mapped now where a patch belongs. */
  #framesOf({ gva, bytes }: Patch): ReadonlySet<Gfn> {
    const frames = new Set<Gfn>();
    const end = gva + BigInt(bytes.length);
    for (let page = pageBase(gva); page < end; page += BigInt(PAGE_SIZE)) {
      if (this.memory.isMapped(page)) frames.add(gfnOf(this.memory.translate(page)));
    }
    return frames;
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

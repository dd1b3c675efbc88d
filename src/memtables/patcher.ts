import type { CloakMap } from '../cloak/cloak-map.js';
import { cloaksOfChange } from '../cloak/pieces.js';
import { MemtablesError } from '../errors.js';
import type { Patch } from '../handlers/plan.js';
import type { Journal } from '../journal/journal.js';
import {
  type Gfn,
  type Gpa,
  type Gva,
  gfnOf,
  gpaOfFrame,
  hex,
  PAGE_SIZE,
  pageOffset,
} from '../vmi/address.js';
import type { GuestMemory } from '../vmi/guest-memory.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import type { InstructionCache } from '../x86/instruction-cache.js';

/** A change that is in the guest. Its identity is the owner of its cloaks. */
export interface AppliedPatch {
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
    private readonly cloaks: CloakMap<AppliedPatch>,
    /** Forgets what was decoded where code changes: no vCPU must be answered by what stood there before. */
    private readonly instructions: InstructionCache,
  ) {}

  /**
   * Writes the patch.
   *
   * @throws MemtablesError of the hypervisor or the journal, with the guest's bytes as before; `ROLLBACK_FAILED`
   *   when they could not be put back
   */
  apply(label: string, patch: Patch): AppliedPatch {
    const applied: AppliedPatch = { label, patch, journalled: new Map() };
    const original = this.memory.read(patch.gva, patch.bytes.length);
    const cloaks = cloaksOfChange({ gva: patch.gva, original, current: patch.bytes, owner: applied }, (gva) =>
      this.memory.translate(gva),
    );
    try {
      for (const cloak of cloaks) {
        const { gpa, original: before, current: after } = cloak;
        applied.journalled.set(gpa, this.journal.record({ gpa, before, after, owner: label }));
        this.cloaks.hide(cloak);
        this.#trap(gfnOf(gpa));
        this.hypervisor.writePhysical(gpa, after);
      }
      this.instructions.invalidate(patch.gva, patch.bytes.length);
    } catch (error) {
      this.#rollBack(applied, error);
      throw error;
    }
    return applied;
  }

  /**
   * Puts the original bytes back, those the guest has written itself included, and ends their hiding.
   *
   * @throws MemtablesError of the hypervisor or the journal; call it again then
   */
  revert(applied: AppliedPatch): void {
    this.instructions.invalidate(applied.patch.gva, applied.patch.bytes.length);
    for (const { gpa, original } of this.cloaks.cloaksOf(applied)) {
      this.hypervisor.writePhysical(gpa, original);
      this.#forget(applied, gpa);
    }
    this.cloaks.reveal(applied);
    this.#releaseUnneeded();
  }

  /** What the guest's own code sees at a virtual address: memory, with all of our changes hidden. */
  readOriginal(gva: Gva, length: number): Uint8Array {
    const bytes = Buffer.alloc(length);
    for (let done = 0; done < length; ) {
      const at = gva + BigInt(done);
      const piece = Math.min(PAGE_SIZE - pageOffset(at), length - done);
      const seen = this.cloaks.overlay(this.memory.translate(at), piece, (gpa, size) =>
        this.hypervisor.readPhysical(gpa, size),
      );
      bytes.set(seen, done);
      done += piece;
    }
    return bytes;
  }

  /**
   * Takes note of guest writes to a hidden range: what the guest wrote is what `revert` puts back.
   *
   * @param length of the write on this page in bytes, if known
   * @returns the patches that the guest has written over
   */
  reconcile(gpa: Gpa, length: number | undefined): AppliedPatch[] {
    const overwritten = this.cloaks.reconcile(
      gpa,
      (at, size) => this.hypervisor.readPhysical(at, size),
      length,
    );
    for (const applied of overwritten) {
      for (const cloak of this.cloaks.cloaksOf(applied)) {
        const renewed = this.journal.record({
          gpa: cloak.gpa,
          before: cloak.original,
          after: cloak.current,
          owner: applied.label,
        });
        this.#forget(applied, cloak.gpa);
        applied.journalled.set(cloak.gpa, renewed);
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

  #forget(applied: AppliedPatch, gpa: Gpa): void {
    const id = applied.journalled.get(gpa);
    if (id === undefined) return;
    this.journal.undone(id);
    applied.journalled.delete(gpa);
  }

  #rollBack(applied: AppliedPatch, cause: unknown): void {
    try {
      this.revert(applied);
      // A piece that was journalled but never hidden was never written either.
      for (const gpa of [...applied.journalled.keys()]) this.#forget(applied, gpa);
    } catch (failure) {
      throw new MemtablesError('ROLLBACK_FAILED', `the ${applied.label} could not be taken back`, {
        remedy: 'The journal names the bytes to put back; restart the guest if nothing else can.',
        context: {
          at: hex(applied.patch.gva),
          why: failure instanceof Error ? failure.message : String(failure),
          frames: [...applied.journalled.keys()].map((gpa) => hex(gpaOfFrame(gfnOf(gpa)))),
        },
        cause,
      });
    }
  }
}

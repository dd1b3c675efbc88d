import { type Gfn, type Gpa, type Gva, gfnOf } from '../vmi/address.js';
import type { HiddenMemory, HiddenPiece, Violation, ViolationAnswer } from '../vmi/hypervisor.js';
import { MAX_INSTRUCTION_LENGTH } from '../x86/instruction.js';
import * as abi from './abi.js';
import type { Answering, Response, TrappedAccess } from './answering.js';

/** What showing hidden bytes takes; may be called inside an event's callback, where Xen's calls do not wait. */
export interface GuestControl {
  /** Whether the session's user has paused the guest. */
  isPaused(): boolean;
  /** Runs `change` while no vCPU runs. */
  whilePaused(change: () => void): void;
  /** Memory as it is now, whatever has been read before. */
  read(gpa: Gpa, length: number): Uint8Array;
  write(gpa: Gpa, bytes: Uint8Array): void;
  /** @param access bits of `vmi_mem_access_t` */
  trap(gfn: Gfn, access: number): void;
  translate(pageTable: bigint, gva: Gva): Gpa | undefined;
}

/** Every answer that lets the access fault again. */
const AGAIN: Response = { flags: abi.RESPONSE_NONE };

/**
 * Xen runs an instruction again after its event, unless it is told to emulate it: what it decodes then, and what it
 * reads, is what memory holds then. Data has no address; it answers every read of the instruction from its first
 * byte on.
 *
 * An instruction with several reads, and a read that crosses a page, are therefore not answered with data. The
 * original bytes of the frame are put into memory for one single step; meanwhile no other vCPU may execute there: it
 * faults again and again until the step is over. At most one vCPU is in such a step.
 */
export class XenAnswering implements Answering {
  hidden: HiddenMemory | undefined;
  #step: Step | undefined;

  constructor(private readonly guest: GuestControl) {}

  get busy(): boolean {
    return this.#step !== undefined;
  }

  answer(violation: TrappedAccess, ask: () => ViolationAnswer): Response {
    // Its step could not be made now, and what it reads may change before it runs again.
    if (this.guest.isPaused()) return AGAIN;
    const { vcpu, rip } = violation;
    const stepping = this.#step?.vcpu === vcpu;
    if (stepping && this.#step?.rip !== rip) {
      // The instruction was emulated, and the one behind has got here before the step was told.
      return this.stepped(vcpu);
    }
    if (!violation.read && !violation.write) {
      // Nobody traps execution but a step: of all vCPUs on the frames that it shows.
      return stepping ? { flags: abi.RESPONSE_EMULATE } : AGAIN;
    }
    const data = ask();
    if (!violation.read) return this.completed(violation);
    if (this.hidden === undefined || this.hidden.readsOnce(violation)) {
      return data === undefined ? this.completed(violation) : { flags: abi.RESPONSE_SET_READ_DATA, data };
    }
    if (this.#step !== undefined && !stepping) return AGAIN;
    this.#step ??= { vcpu, rip, shown: new Map() };
    try {
      this.#show(violation, this.#step);
    } catch (error) {
      this.end();
      throw error;
    }
    return stepping ? AGAIN : { flags: abi.RESPONSE_TOGGLE_SINGLE_STEP };
  }

  completed(violation: Violation): Response {
    return violation.read || violation.write ? { flags: abi.RESPONSE_EMULATE } : AGAIN;
  }

  stepped(vcpu: number): Response {
    if (this.#step?.vcpu !== vcpu) return AGAIN;
    this.end();
    return { flags: abi.RESPONSE_TOGGLE_SINGLE_STEP };
  }

  end(): void {
    const step = this.#step;
    if (step === undefined) return;
    this.guest.whilePaused(() => {
      for (const [gfn, pieces] of step.shown) {
        for (const piece of pieces) this.#hideAgain(piece);
        this.guest.trap(gfn, abi.ACCESS_READ | abi.ACCESS_WRITE);
        step.shown.delete(gfn);
      }
    });
    this.#step = undefined;
  }

  /** Puts the original bytes of the frame that was read into memory. */
  #show({ gpa, rip, pageTable }: TrappedAccess, { shown }: Step): void {
    const gfn = gfnOf(gpa);
    const code = this.guest.translate(pageTable, rip);
    // The instruction itself has to stay what it is.
    const pieces = (this.hidden?.piecesOn(gfn) ?? []).filter(
      (piece) => code === undefined || !holdsCode(piece, code),
    );
    shown.set(gfn, pieces);
    this.guest.whilePaused(() => {
      for (const { gpa, original } of pieces) this.guest.write(gpa, original);
      this.guest.trap(gfn, abi.ACCESS_EXECUTE);
    });
  }

  /** What the guest has written meanwhile stays. */
  #hideAgain(piece: HiddenPiece): void {
    const { gpa, original, current } = piece;
    const memory = this.guest.read(gpa, original.length);
    this.guest.write(
      gpa,
      memory.map((byte, index) => (byte === original[index] ? current[index]! : byte)),
    );
    if (Buffer.compare(memory, original) !== 0) this.hidden?.overwritten(piece);
  }
}

/** The vCPU that makes it, at which instruction, and the frames that show their original bytes for it. */
interface Step {
  readonly vcpu: number;
  readonly rip: Gva;
  readonly shown: Map<Gfn, readonly HiddenPiece[]>;
}

function holdsCode({ gpa, original }: HiddenPiece, code: Gpa): boolean {
  return gpa < code + BigInt(MAX_INSTRUCTION_LENGTH) && code < gpa + BigInt(original.length);
}

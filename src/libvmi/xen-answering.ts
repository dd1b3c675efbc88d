import { type Gfn, type Gpa, type Gva, gfnOf, gpaOfFrame, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import type { HiddenMemory, HiddenPiece, ViolationAnswer } from '../vmi/hypervisor.js';
import { MAX_INSTRUCTION_LENGTH } from '../x86/instruction.js';
import type { Registers } from '../x86/registers.js';
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
  registers(vcpu: number): Pick<Registers, 'rip' | 'rcx'>;
  /** The frames whose reads are violations, as the session's user wants it. */
  trapped(): readonly Gfn[];
}

/** Lets the access fault again. */
const AGAIN: Response = { flags: abi.RESPONSE_NONE };
const EVERY_ACCESS = abi.ACCESS_READ | abi.ACCESS_WRITE | abi.ACCESS_EXECUTE;
/** Data is for an instruction that is emulated, too. */
const EMULATES = abi.RESPONSE_EMULATE | abi.RESPONSE_SET_READ_DATA;
const TOGGLE_STEP: Response = { flags: abi.RESPONSE_TOGGLE_SINGLE_STEP };

/**
 * Xen runs an instruction again after its event, unless it is told to emulate it: what it decodes then, and what it
 * reads, is what memory holds then. Data has no address; it answers every read of the instruction from its first
 * byte on.
 *
 * An instruction with several reads, and a read that crosses a page, are therefore not answered with data. The
 * original bytes of the frame are put into memory for one single step; meanwhile no other vCPU may execute there: it
 * faults again and again until the step is over. At most one vCPU is in such a step.
 *
 * Where the processor has no monitor trap flag, Xen cannot step. Then the instruction is emulated, in one go whatever
 * it reads: with the original bytes of all frames in memory, and no vCPU with any access to these. That it is through is
 * seen by the vCPU's registers, or by its next event.
 *
 * What a vCPU was told to emulate it carries out when it runs next, which may be after a pause. Nothing may be written
 * or shown by then that it would decode in place of its instruction.
 */
export class XenAnswering implements Answering {
  readonly mostVcpus = abi.MAX_STEPPED_VCPUS;
  hidden: HiddenMemory | undefined;
  accepting = true;
  #step: Step | undefined;
  #canStep = true;
  /** By vCPU: the last violation that it was told to emulate, unless it has been seen to be through. */
  readonly #emulated = new Map<number, Place>();

  constructor(private readonly guest: GuestControl) {}

  get busy(): boolean {
    return this.#step !== undefined;
  }

  answer(violation: TrappedAccess, ask: () => ViolationAnswer): Response {
    // It got this far.
    this.#emulated.delete(violation.vcpu);
    return this.#noted(violation, this.#decide(violation, ask));
  }

  completed(violation: TrappedAccess): Response {
    const isData = violation.read || violation.write;
    return this.#noted(violation, isData ? { flags: abi.RESPONSE_EMULATE } : AGAIN);
  }

  #noted(violation: TrappedAccess, response: Response): Response {
    if ((response.flags & EMULATES) !== 0) this.#emulated.set(violation.vcpu, placeOf(violation));
    return response;
  }

  #decide(violation: TrappedAccess, ask: () => ViolationAnswer): Response {
    const { vcpu, rip, read, write } = violation;
    // What was emulated is through.
    if (!this.#canStep && this.#step?.vcpu === vcpu) this.end();
    const stepping = this.#step?.vcpu === vcpu;
    // Its step could not be made now, and what it reads may change before it runs again.
    if (this.guest.isPaused() || !(this.accepting || stepping)) return AGAIN;
    // The instruction was emulated, and the one behind has got here before the step was told.
    if (stepping && this.#step?.rip !== rip) return this.stepped(vcpu);
    // Nobody traps execution but a step: of all vCPUs on the frames that it shows.
    if (!read && !write) return stepping ? { flags: abi.RESPONSE_EMULATE } : AGAIN;
    if (!stepping && this.#step !== undefined && this.#isShown(placeOf(violation), this.#step)) return AGAIN;
    const length = read ? this.hidden?.onlyRead(violation) : undefined;
    const needsStep = read && this.hidden !== undefined && length === undefined;
    if (needsStep && this.#step !== undefined && !stepping) return AGAIN;
    // Released since it trapped: the step would trap it again at its end.
    if (needsStep && !this.guest.trapped().includes(gfnOf(violation.gpa))) return AGAIN;
    const data = ask();
    if (needsStep) return this.#stepOver(violation);
    if (data === undefined) return this.completed(violation);
    return { flags: abi.RESPONSE_SET_READ_DATA, data: data.subarray(0, length) };
  }

  doWithoutSteps(): boolean {
    this.#canStep = false;
    return true;
  }

  look(): void {
    const step = this.#step;
    if (step === undefined || this.#canStep) return;
    if (this.#hasLeft(step)) this.end();
  }

  settled(): boolean {
    for (const [vcpu, place] of this.#emulated) if (this.#hasLeft(place)) this.#emulated.delete(vcpu);
    return this.#emulated.size === 0;
  }

  #hasLeft({ vcpu, rip, rcx }: Place): boolean {
    const now = this.guest.registers(vcpu);
    return now.rip !== rip || now.rcx !== rcx;
  }

  /** That an event comes says that stepping is on, also where its step was given up. */
  stepped(vcpu: number): Response {
    if (this.#step?.vcpu === vcpu) this.end();
    return TOGGLE_STEP;
  }

  end(): void {
    const step = this.#step;
    if (step === undefined) return;
    this.guest.whilePaused(() => {
      for (const [gfn, frame] of step.shown) {
        this.#hideAgain(gfn, frame);
        this.guest.trap(gfn, abi.ACCESS_READ | abi.ACCESS_WRITE);
        step.shown.delete(gfn);
      }
    });
    this.#step = undefined;
  }

  #stepOver(violation: TrappedAccess): Response {
    const begins = this.#step === undefined;
    const step = this.#step ?? { ...placeOf(violation), shown: new Map() };
    this.#step = step;
    const code = this.#codeAt(step);
    const frames = this.#canStep ? [gfnOf(violation.gpa)] : this.guest.trapped();
    let harms = false;
    try {
      this.guest.whilePaused(() => {
        for (const gfn of frames) this.#show(gfn, code, step);
        harms = !this.settled() && [...this.#emulated.values()].some((place) => this.#isShown(place, step));
      });
    } catch (error) {
      this.end();
      throw error;
    }
    if (harms) {
      // Nobody has run since.
      this.end();
      return AGAIN;
    }
    if (!this.#canStep) return { flags: abi.RESPONSE_EMULATE };
    return begins ? TOGGLE_STEP : AGAIN;
  }

  /** Whether the instruction there would be decoded from bytes that are shown. */
  #isShown(place: Place, { shown }: Step): boolean {
    const code = this.#codeAt(place);
    return [...shown.values()].some(({ pieces }) =>
      pieces.some((piece) => code.some((part) => overlaps(piece, part))),
    );
  }

  /** Puts the original bytes of a frame into memory, as a whole page: that is one call to Xen, and no vCPU runs. */
  #show(gfn: Gfn, code: readonly Part[], { shown }: Step): void {
    // The instruction itself has to stay what it is.
    const pieces = (this.hidden?.piecesOn(gfn) ?? []).filter(
      (piece) => !code.some((part) => overlaps(piece, part)),
    );
    const memory = Uint8Array.from(this.guest.read(gpaOfFrame(gfn), PAGE_SIZE));
    for (const { gpa, original } of pieces) memory.set(original, pageOffset(gpa));
    this.guest.write(gpaOfFrame(gfn), memory);
    shown.set(gfn, { pieces, memory });
    this.guest.trap(gfn, this.#canStep ? abi.ACCESS_EXECUTE : EVERY_ACCESS);
  }

  /** What the guest has written meanwhile stays. */
  #hideAgain(gfn: Gfn, frame: ShownFrame): void {
    const now = this.guest.read(gpaOfFrame(gfn), PAGE_SIZE);
    // Hardly ever, and a look at each byte takes long.
    const someWritten = Buffer.compare(now, frame.memory) !== 0;
    const isWritten = (offset: number) => someWritten && now[offset] !== frame.memory[offset];
    const hit = frame.pieces.filter(({ gpa, original }) =>
      original.some((_, index) => isWritten(pageOffset(gpa) + index)),
    );
    if (someWritten) this.hidden?.written(hit);
    const hidden = Uint8Array.from(now);
    for (const { gpa, current } of frame.pieces) {
      current.forEach((byte, index) => {
        const at = pageOffset(gpa) + index;
        if (!isWritten(at)) hidden[at] = byte;
      });
    }
    this.guest.write(gpaOfFrame(gfn), hidden);
  }

  /** Where the longest instruction at `rip` would lie. */
  #codeAt({ pageTable, rip }: Place): Part[] {
    const onPage = Math.min(MAX_INSTRUCTION_LENGTH, PAGE_SIZE - pageOffset(rip));
    const parts = [
      { gva: rip, length: onPage },
      { gva: rip + BigInt(onPage), length: MAX_INSTRUCTION_LENGTH - onPage },
    ];
    return parts.flatMap(({ gva, length }) => {
      const gpa = length === 0 ? undefined : this.guest.translate(pageTable, gva);
      return gpa === undefined ? [] : [{ gpa, length }];
    });
  }
}

interface ShownFrame {
  readonly pieces: readonly HiddenPiece[];
  /** What the frame holds while it is shown, unless the guest writes to it. */
  readonly memory: Uint8Array;
}

/** An instruction that a vCPU stands at. */
interface Place {
  readonly vcpu: number;
  readonly pageTable: bigint;
  readonly rip: Gva;
  /** Counts a repeated instruction, which may be through in several steps. */
  readonly rcx: bigint;
}

function placeOf(violation: TrappedAccess): Place {
  const { vcpu, pageTable, rip } = violation;
  return { vcpu, pageTable, rip, rcx: violation.register('rcx') };
}

/** Where the vCPU that makes it stood, and the frames that show their original bytes for it. */
interface Step extends Place {
  readonly shown: Map<Gfn, ShownFrame>;
}

interface Part {
  readonly gpa: Gpa;
  readonly length: number;
}

function overlaps({ gpa, original }: HiddenPiece, part: Part): boolean {
  return gpa < part.gpa + BigInt(part.length) && part.gpa < gpa + BigInt(original.length);
}

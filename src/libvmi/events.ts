import koffi from 'koffi';
import { MemtablesError } from '../errors.js';
import { type Gpa, type Gva, gpaOfFrame } from '../vmi/address.js';
import type { HiddenMemory, ViolationHandler } from '../vmi/hypervisor.js';
import type { GprName } from '../x86/registers.js';
import * as abi from './abi.js';
import type { Answering, Response, TrappedAccess } from './answering.js';
import { NativeBlock } from './native-block.js';
import type { Heartbeat } from './watchdog.js';

const CALLBACK = koffi.pointer(koffi.proto('uint32_t', ['void *', 'void *']));

/**
 * The events that answer whatever a vCPU may raise: one unanswered would freeze it, and then every later resume.
 * They stay registered until the session ends.
 *
 * One answers every EPT violation, of any frame and any access (two that overlap would both answer). The other
 * answers single steps; it starts none.
 */
export class SessionEvents {
  #handler: ViolationHandler | undefined;
  /** How many events have been answered so far. */
  answered = 0;
  readonly #violation = new NativeBlock(abi.EVENT.size);
  readonly #singleStep = new NativeBlock(abi.EVENT.size);
  readonly #readData = new NativeBlock(abi.READ_DATA.size);
  readonly #callback: bigint;
  readonly #answering: Answering;
  #open: OpenViolation | undefined;
  /** The first of what the handler threw and nobody has heard of yet. */
  #failure: { readonly error: unknown } | undefined;

  constructor(vcpuCount: number, heartbeat: Heartbeat, answering: Answering) {
    this.#answering = answering;
    this.#callback = koffi.register((_instance: bigint, event: bigint) => {
      heartbeat.beat();
      this.answered++;
      return event === this.#violation.address ? this.#answerViolation() : this.#answerStep();
    }, CALLBACK);
    for (const event of [this.#violation, this.#singleStep]) {
      event.setU32(abi.EVENT.version, abi.EVENTS_VERSION);
      event.setU64(abi.EVENT.callback, this.#callback);
    }
    this.#violation.view.setUint16(abi.EVENT.type, abi.EVENT_TYPE_MEMORY, true);
    this.#violation.setU64(abi.EVENT.gfn, abi.EVERY_FRAME);
    this.#violation.bytes[abi.EVENT.generic] = 1;
    this.#violation.bytes[abi.EVENT.inAccess] = abi.ACCESS_READ | abi.ACCESS_WRITE | abi.ACCESS_EXECUTE;
    this.#singleStep.view.setUint16(abi.EVENT.type, abi.EVENT_TYPE_SINGLE_STEP, true);
    this.#singleStep.setU32(abi.EVENT.steppedVcpus, 2 ** Math.min(vcpuCount, abi.MAX_STEPPED_VCPUS) - 1);
    // The library must not free what it did not allocate.
    this.#readData.bytes[abi.READ_DATA.dontFree] = 1;
  }

  /** The `vmi_event_t` of violations, to be registered. */
  get violation(): bigint {
    return this.#violation.address;
  }

  /** That of single steps. */
  get singleStep(): bigint {
    return this.#singleStep.address;
  }

  setHandler(handler: ViolationHandler | undefined, hidden: HiddenMemory | undefined): void {
    this.#handler = handler;
    this.#answering.hidden = hidden;
  }

  get inHandler(): boolean {
    return this.#open !== undefined;
  }

  /** Throws what the handler threw since the last call. */
  rethrow(): void {
    const failure = this.#failure;
    this.#failure = undefined;
    if (failure !== undefined) throw failure.error;
  }

  /** Only once the library no longer knows the events. */
  dispose(): void {
    koffi.unregister(this.#callback);
  }

  /** Runs inside the library: must return an answer whatever happens. */
  #answerViolation(): number {
    const violation = new OpenViolation(this.#violation);
    this.#open = violation;
    try {
      return this.#respond(this.#answering.answer(violation, () => this.#ask(violation)));
    } catch (error) {
      this.#failure ??= { error };
      return this.#answering.completed(violation).flags;
    } finally {
      violation.close();
      this.#open = undefined;
    }
  }

  #answerStep(): number {
    try {
      return this.#answering.stepped(this.#singleStep.u32(abi.EVENT.vcpu)).flags;
    } catch (error) {
      this.#failure ??= { error };
      return abi.RESPONSE_NONE;
    }
  }

  #ask(violation: OpenViolation): Uint8Array | undefined {
    const data = this.#handler?.(violation);
    // libvmi leaves an event with more data unanswered; with none, the guest would see its real bytes.
    if (data !== undefined && (data.length === 0 || data.length > abi.READ_DATA.capacity)) {
      throw new MemtablesError('INVALID_ARGUMENT', `a read was answered with ${data.length} bytes`, {
        remedy: `Answer with 1 to ${abi.READ_DATA.capacity} bytes.`,
        context: { length: data.length },
      });
    }
    return data;
  }

  #respond({ flags, data }: Response): number {
    if (data !== undefined) {
      this.#readData.setU32(abi.READ_DATA.length, data.length);
      this.#readData.bytes.set(data, abi.READ_DATA.bytes);
      this.#violation.setU64(abi.EVENT.registersOrReadData, this.#readData.address);
    }
    return flags;
  }
}

class OpenViolation implements TrappedAccess {
  readonly vcpu: number;
  readonly rip: Gva;
  readonly gva: Gva;
  readonly gpa: Gpa;
  readonly read: boolean;
  readonly write: boolean;
  readonly execute: boolean;
  /** The library's register file, gone once the violation is answered. */
  #registers: bigint | undefined;

  constructor(event: NativeBlock) {
    const access = event.bytes[abi.EVENT.outAccess]!;
    this.#registers = event.u64(abi.EVENT.registersOrReadData);
    this.vcpu = event.u32(abi.EVENT.vcpu);
    this.rip = this.#load('rip');
    this.gva = event.u64(abi.EVENT.gla);
    this.gpa = gpaOfFrame(event.u64(abi.EVENT.gfn)) | event.u64(abi.EVENT.offset);
    this.read = (access & abi.ACCESS_READ) !== 0;
    this.write = (access & abi.ACCESS_WRITE) !== 0;
    this.execute = (access & abi.ACCESS_EXECUTE) !== 0;
  }

  get pageTable(): bigint {
    return this.#load('cr3');
  }

  register(name: GprName): bigint {
    return this.#load(name);
  }

  close(): void {
    this.#registers = undefined;
  }

  #load(name: GprName | 'rip' | 'cr3'): bigint {
    if (this.#registers === undefined) {
      throw new MemtablesError('INVALID_ARGUMENT', `${name} was read after its violation had been answered`, {
        remedy: 'Read registers while the violation is being handled.',
        context: { vcpu: this.vcpu, rip: this.rip },
      });
    }
    return BigInt(koffi.decode.uint64(this.#registers + BigInt(abi.REGISTER_OFFSETS[name])));
  }
}

import koffi from 'koffi';
import { MemtablesError } from '../errors.js';
import { type Gpa, type Gva, gpaOfFrame } from '../vmi/address.js';
import type { Violation, ViolationHandler } from '../vmi/hypervisor.js';
import type { GprName } from '../x86/registers.js';
import * as abi from './abi.js';
import { NativeBlock } from './native-block.js';
import type { Heartbeat } from './watchdog.js';

const CALLBACK = koffi.pointer(koffi.proto('uint32_t', ['void *', 'void *']));

/**
 * The one event that answers every EPT violation, of any frame and any access.
 *
 * One, because two that overlap would both answer; for everything, because a violation without an event leaves
 * its vCPU frozen. It stays registered until the session ends.
 */
export class ViolationEvents {
  handler: ViolationHandler | undefined;
  /** How many violations have been answered so far. */
  answered = 0;
  readonly #event = new NativeBlock(abi.EVENT.size);
  readonly #readData = new NativeBlock(abi.READ_DATA.size);
  readonly #callback: bigint;
  #open: OpenViolation | undefined;
  #failures: unknown[] = [];

  constructor(heartbeat: Heartbeat) {
    this.#callback = koffi.register(() => {
      heartbeat.beat();
      return this.#answer();
    }, CALLBACK);
    const { view } = this.#event;
    this.#event.setU32(abi.EVENT.version, abi.EVENTS_VERSION);
    view.setUint16(abi.EVENT.type, abi.EVENT_TYPE_MEMORY, true);
    this.#event.setU64(abi.EVENT.callback, this.#callback);
    this.#event.setU64(abi.EVENT.gfn, abi.EVERY_FRAME);
    view.setUint8(abi.EVENT.generic, 1);
    view.setUint8(abi.EVENT.inAccess, abi.ACCESS_READ | abi.ACCESS_WRITE | abi.ACCESS_EXECUTE);
    // The library must not free what it did not allocate.
    this.#readData.view.setUint8(abi.READ_DATA.dontFree, 1);
  }

  /** The `vmi_event_t` to register. */
  get address(): bigint {
    return this.#event.address;
  }

  get inHandler(): boolean {
    return this.#open !== undefined;
  }

  /** Throws what the handler threw since the last call. */
  rethrow(): void {
    if (this.#failures.length === 0) return;
    const [first] = this.#failures;
    this.#failures = [];
    throw first;
  }

  /** Only once the library no longer knows the event. */
  dispose(): void {
    koffi.unregister(this.#callback);
  }

  /** Runs inside the library: must return an answer whatever happens. */
  #answer(): number {
    this.answered++;
    if (this.handler === undefined) return abi.RESPONSE_NONE;
    const violation = new OpenViolation(this.#event);
    this.#open = violation;
    try {
      const data = this.handler(violation);
      return data === undefined ? abi.RESPONSE_NONE : this.#substitute(data);
    } catch (error) {
      this.#failures.push(error);
      return abi.RESPONSE_NONE;
    } finally {
      violation.close();
      this.#open = undefined;
    }
  }

  #substitute(data: Uint8Array): number {
    // libvmi leaves an event with more data unanswered; with none, the guest would see its real bytes.
    if (data.length === 0 || data.length > abi.READ_DATA.capacity) {
      throw new MemtablesError('INVALID_ARGUMENT', `a read was answered with ${data.length} bytes`, {
        remedy: `Answer with 1 to ${abi.READ_DATA.capacity} bytes.`,
        context: { length: data.length },
      });
    }
    this.#readData.setU32(abi.READ_DATA.length, data.length);
    this.#readData.bytes.set(data, abi.READ_DATA.bytes);
    this.#event.setU64(abi.EVENT.registersOrReadData, this.#readData.address);
    return abi.RESPONSE_SET_READ_DATA;
  }
}

class OpenViolation implements Violation {
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

  register(name: GprName): bigint {
    return this.#load(name);
  }

  close(): void {
    this.#registers = undefined;
  }

  #load(name: GprName | 'rip'): bigint {
    if (this.#registers === undefined) {
      throw new MemtablesError('INVALID_ARGUMENT', `${name} was read after its violation had been answered`, {
        remedy: 'Read registers while the violation is being handled.',
        context: { vcpu: this.vcpu, rip: this.rip },
      });
    }
    return BigInt(koffi.decode.uint64(this.#registers + BigInt(abi.REGISTER_OFFSETS[name])));
  }
}

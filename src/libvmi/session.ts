import { MemtablesError } from '../errors.js';
import { type Gfn, type Gpa, type Gva, gpaOfFrame, hex, PAGE_SIZE } from '../vmi/address.js';
import type { HiddenMemory, Hypervisor, ViolationHandler } from '../vmi/hypervisor.js';
import type { Registers } from '../x86/registers.js';
import * as abi from './abi.js';
import { type Answering, KvmAnswering } from './answering.js';
import type { NativeCalls } from './calls.js';
import { cutConnection } from './cut.js';
import { SessionEvents } from './events.js';
import type { Argument } from './library.js';
import { NativeBlock } from './native-block.js';
import { type GuestControl, XenAnswering } from './xen-answering.js';

/** What libvmi passes on as a signed 32-bit integer. */
const MAX_TIMEOUT_MS = 0x7fff_ffff;
/** The part of CR3 that is an address: neither PCID nor flags. */
const PAGE_TABLE_MASK = 0x000f_ffff_ffff_f000n;
const VIRTUAL_BITS = 48;
/** Vcpus report one event at a time; a drained guest is silent after a round or two. */
const MAX_DRAIN_ROUNDS = 100;
/** How long a vCPU may take for one instruction, and between two looks at it. */
const STEP_MS = 10_000;
const STEP_LISTEN_MS = 20;
const SETTLE_LISTEN_MS = 1;
const CR4_LA57 = 1n << 12n;
/** A VM has one view of memory unless more are made. */
const DEFAULT_VIEW = 0;

const REGISTERS = Object.entries(abi.REGISTER_OFFSETS) as readonly [keyof Registers, number][];

/**
 * A guest seen through libvmi. Belongs to one thread, which its calls block; a `Watchdog` in another thread
 * notices when one never returns.
 *
 * Once the hypervisor has gone, or after `close`, every method but `close` throws `HYPERVISOR_GONE` at once.
 */
export class LibvmiSession implements Hypervisor {
  readonly vcpuCount: number;
  readonly maxPhysicalAddress: Gpa;
  readonly #calls: NativeCalls;
  readonly #instance: bigint;
  readonly #socket: string | undefined;
  readonly #answering: Answering;
  readonly #events: SessionEvents;
  readonly #trapped = new Set<Gfn>();
  readonly #registers = new NativeBlock(abi.REGISTERS_SIZE);
  readonly #word = new NativeBlock(BigUint64Array.BYTES_PER_ELEMENT);
  #pauses = 0;
  #gone = false;
  #closed = false;

  /** Use `openSession`. */
  constructor(calls: NativeCalls, instance: bigint, socket: string | undefined) {
    this.#calls = calls;
    this.#instance = instance;
    this.#socket = socket;
    this.vcpuCount = calls.call('vmi_get_num_vcpus', instance);
    this.#answering = socket === undefined ? new XenAnswering(this.#control()) : new KvmAnswering();
    this.#events = new SessionEvents(this.vcpuCount, calls.heartbeat, this.#answering);
    this.maxPhysicalAddress = calls.call64('vmi_get_max_physical_address', instance);
  }

  /** The second half of attaching, which can fail on a guest that is there. */
  start(): void {
    const mode = this.#call('vmi_init_paging', 0);
    if (mode !== abi.PAGE_MODE_IA32E) {
      this.#assertStillThere();
      throw unsupportedPaging({ pageMode: mode });
    }
    // libvmi takes five levels for four.
    const { cr4 } = this.registers(0);
    if ((cr4 & CR4_LA57) !== 0n) throw unsupportedPaging({ pageMode: mode, cr4 });
    if (this.vcpuCount > this.#answering.mostVcpus)
      throw tooManyVcpus(this.vcpuCount, this.#answering.mostVcpus);
    this.#check('vmi_register_event', this.#events.violation);
    const steps = this.#call('vmi_register_event', this.#events.singleStep) === abi.STATUS_SUCCESS;
    if (!steps && !this.#answering.doWithoutSteps()) this.#fail('vmi_register_event');
  }

  readPhysical(gpa: Gpa, length: number): Uint8Array {
    this.#assertAlive();
    this.#assertInMemory(gpa, length);
    const bytes = Buffer.alloc(length);
    if (length > 0) this.#check('vmi_read_pa', gpa, length, bytes, null);
    return bytes;
  }

  /** @throws MemtablesError `NOT_QUIESCENT` while the guest runs, and inside a violation handler */
  writePhysical(gpa: Gpa, bytes: Uint8Array): void {
    this.#assertMayWrite('writePhysical');
    this.#assertInMemory(gpa, bytes.length);
    if (bytes.length > 0) this.#check('vmi_write_pa', gpa, bytes.length, bytes, null);
  }

  translate(pageTable: Gpa, gva: Gva): Gpa | undefined {
    this.#assertAlive();
    // libvmi ignores the upper bits of a virtual address; the processor faults.
    if (BigInt.asUintN(64, BigInt.asIntN(VIRTUAL_BITS, gva)) !== gva) return undefined;
    const root = pageTable & PAGE_TABLE_MASK;
    const status = this.#call('vmi_pagetable_lookup', root, gva, this.#word.bytes);
    if (status === abi.STATUS_SUCCESS) return this.#word.u64(0);
    // Not mapped, or nobody there to ask.
    this.#assertStillThere();
    return undefined;
  }

  flushCaches(): void {
    this.#assertAlive();
    this.#call('vmi_pagecache_flush');
    this.#call('vmi_v2pcache_flush', abi.EVERY_PAGE_TABLE);
  }

  registers(vcpu: number): Registers {
    this.#assertAlive();
    this.#loadRegisters(vcpu);
    const registers = {} as Record<keyof Registers, bigint>;
    for (const [name, offset] of REGISTERS) registers[name] = this.#registers.u64(offset);
    return registers;
  }

  /** @throws MemtablesError `NOT_QUIESCENT` while the guest runs, and inside a violation handler */
  setRegisters(vcpu: number, registers: Registers): void {
    this.#assertMayWrite('setRegisters');
    // The whole file in one call: of several single ones all but the last may be lost.
    this.#loadRegisters(vcpu);
    for (const [name, offset] of REGISTERS) {
      if (abi.isSettable(name)) this.#registers.setU64(offset, registers[name]);
    }
    this.#check('vmi_set_vcpuregs', this.#registers.address, vcpu);
  }

  /** Counted: the guest runs again after as many calls of `resume`. */
  pause(): void {
    this.#assertOutsideHandler('pause');
    if (this.#pauses === 0) this.#pauseSettled();
    this.#pauses++;
  }

  /** @throws MemtablesError `HYPERVISOR_STUCK` when a vCPU does not stop; the guest has been let go then */
  resume(): void {
    this.#assertOutsideHandler('resume');
    if (this.#pauses === 0) {
      throw new MemtablesError('INVALID_ARGUMENT', 'the guest is not paused', {
        remedy: 'Call resume once for each pause.',
      });
    }
    const status = this.#pauses === 1 ? this.#call('vmi_resume_vm') : abi.STATUS_SUCCESS;
    if (status !== abi.STATUS_SUCCESS) this.#failResume();
    this.#pauses--;
    this.#events.rethrow();
  }

  trapAccess(gfn: Gfn): void {
    // libvmi refuses to trap reads alone.
    this.#setTrappedAccess(gfn, abi.ACCESS_READ | abi.ACCESS_WRITE);
    this.#trapped.add(gfn);
  }

  releaseAccess(gfn: Gfn): void {
    this.#setTrappedAccess(gfn, abi.ACCESS_NONE);
    this.#trapped.delete(gfn);
  }

  onViolation(handler: ViolationHandler | undefined, hidden?: HiddenMemory): void {
    this.#events.setHandler(handler, hidden);
  }

  listen(timeoutMs: number): number {
    this.#assertOutsideHandler('listen');
    if (!Number.isInteger(timeoutMs) || timeoutMs < 0 || timeoutMs > MAX_TIMEOUT_MS) {
      throw new MemtablesError('INVALID_ARGUMENT', `${timeoutMs} is not a timeout`, {
        remedy: `Give whole milliseconds from 0 to ${MAX_TIMEOUT_MS}.`,
        context: { timeoutMs },
      });
    }
    return this.#listen(timeoutMs);
  }

  #listen(timeoutMs: number): number {
    const before = this.#events.answered;
    const status = this.#calls.waitingCall(timeoutMs, 'vmi_events_listen', this.#instance, timeoutMs);
    this.#events.rethrow();
    if (status !== abi.STATUS_SUCCESS) this.#fail('vmi_events_listen');
    this.#answering.look();
    return this.#events.answered - before;
  }

  /** Pauses where no vCPU has yet to carry out what it was answered. */
  #pauseSettled(): void {
    this.#withoutAccepting((deadline) => {
      for (;;) {
        this.#finishStep(deadline);
        if (this.#pausedSettled()) return;
        assertNotStuck(deadline);
        this.#listen(SETTLE_LISTEN_MS);
      }
    });
  }

  /** Pauses; lets the guest run again where it is not settled, or that cannot be found out. */
  #pausedSettled(): boolean {
    this.#check('vmi_pause_vm');
    try {
      if (this.#answering.settled()) return true;
    } catch (error) {
      this.#call('vmi_resume_vm');
      throw error;
    }
    this.#check('vmi_resume_vm');
    return false;
  }

  #withoutAccepting(work: (deadline: number) => void): void {
    this.#answering.accepting = false;
    try {
      work(performance.now() + STEP_MS);
    } finally {
      this.#answering.accepting = true;
    }
  }

  /** Until an answer that takes several events is through, the guest has to run, and memory is not what it is to be. */
  #finishStep(deadline: number): void {
    while (this.#answering.busy) {
      assertNotStuck(deadline);
      this.#listen(STEP_LISTEN_MS);
    }
  }

  /** What an answer may do with the guest by itself; no check for being inside a handler, because it is. */
  #control(): GuestControl {
    return {
      isPaused: () => this.#pauses > 0,
      whilePaused: (change) => {
        this.#check('vmi_pause_vm');
        try {
          change();
        } finally {
          this.#check('vmi_resume_vm');
        }
      },
      read: (gpa, length) => {
        this.flushCaches();
        return this.readPhysical(gpa, length);
      },
      write: (gpa, bytes) => this.#check('vmi_write_pa', gpa, bytes.length, bytes, null),
      trap: (gfn, access) => this.#setTrappedAccess(gfn, access),
      translate: (pageTable, gva) => this.translate(pageTable, gva),
      registers: (vcpu) => this.registers(vcpu),
      trapped: () => [...this.#trapped],
    };
  }

  /**
   * Gives every frame its permissions back (libvmi itself leaves them on KVM), answers what is outstanding, lets
   * the guest run and detaches. Does nothing the second time; a hypervisor that has gone is no error.
   */
  close(): void {
    if (this.#closed) return;
    if (this.#events.inHandler) throw refusedInHandler('close');
    const failure = this.#giveBack();
    // Xen does not notice that the tool is gone.
    if (this.#socket === undefined && this.#pauses > 0) this.#call('vmi_resume_vm');
    this.#closed = true;
    this.#call('vmi_destroy');
    this.#events.dispose();
    this.#events.rethrow();
    if (failure !== undefined && !this.#gone) throw failure.error;
  }

  /** Carries out every step, also after one has failed; returns the first failure. */
  #giveBack(): { readonly error: unknown } | undefined {
    const steps = [
      () => this.#withoutAccepting((deadline) => this.#finishStep(deadline)),
      () => this.#answering.end(),
      () => {
        this.#answering.accepting = false;
      },
      ...[...this.#trapped].map((gfn) => () => this.releaseAccess(gfn)),
      () => this.#drain(),
      () => {
        if (this.#pauses > 0) this.#check('vmi_resume_vm');
        this.#pauses = 0;
      },
      () => this.#drain(),
    ];
    let failure: { readonly error: unknown } | undefined;
    for (const step of steps) {
      try {
        step();
      } catch (error) {
        failure ??= { error };
      }
    }
    return failure;
  }

  /** Answers until a whole round of register reads, served by each vCPU itself, brings no event. */
  #drain(): void {
    for (let round = 0; round < MAX_DRAIN_ROUNDS; round++) {
      const before = this.#events.answered;
      for (let vcpu = 0; vcpu < this.vcpuCount; vcpu++) this.#loadRegisters(vcpu);
      this.#check('vmi_events_listen', 0);
      if (this.#events.answered === before) return;
    }
  }

  #setTrappedAccess(gfn: Gfn, access: number): void {
    this.#assertAlive();
    // For a frame outside, libvmi would believe that the guest has that much memory.
    this.#assertInMemory(gpaOfFrame(gfn), PAGE_SIZE);
    this.#check('vmi_set_mem_event', gfn, access, DEFAULT_VIEW);
  }

  #loadRegisters(vcpu: number): void {
    if (!Number.isInteger(vcpu) || vcpu < 0 || vcpu >= this.vcpuCount) {
      throw new MemtablesError('INVALID_ARGUMENT', `there is no vCPU ${vcpu}`, {
        remedy: `Give a number below ${this.vcpuCount}.`,
        context: { vcpu, vcpuCount: this.vcpuCount },
      });
    }
    this.#check('vmi_get_vcpuregs', this.#registers.address, vcpu);
  }

  #call(name: abi.FunctionName, ...args: readonly Argument[]): number {
    return this.#calls.call(name, this.#instance, ...args);
  }

  #check(name: abi.FunctionName, ...args: readonly Argument[]): void {
    this.#assertAlive();
    if (this.#call(name, ...args) !== abi.STATUS_SUCCESS) this.#fail(name, args);
  }

  #fail(name: abi.FunctionName, args: readonly Argument[] = []): never {
    this.#assertStillThere();
    throw new MemtablesError('HYPERVISOR_FAILED', `${name} failed`, {
      remedy: 'See what the library has printed; libvmi itself prints more with LIBVMI_DEBUG=1.',
      context: { call: name, arguments: args.filter((value) => typeof value !== 'object') },
    });
  }

  /** Some vCPUs run again and others do not: a pause would no longer mean that nothing runs. */
  #failResume(): never {
    this.#assertStillThere();
    this.#leave();
    throw new MemtablesError('HYPERVISOR_STUCK', 'a vCPU did not stop, so the guest could not be resumed', {
      remedy:
        this.#socket === undefined
          ? 'The guest may still be paused (xl unpause); a journal that was left behind lists what is in it.'
          : 'The guest was let go; if a journal was left behind, it lists what is still in the guest.',
      context: { call: 'vmi_resume_vm' },
    });
  }

  /** libvmi does not say whether a call failed because nobody is there: ask what is always answered. */
  #assertStillThere(): void {
    const firstVcpu = 0;
    if (this.#call('vmi_get_vcpuregs', this.#registers.address, firstVcpu) === abi.STATUS_SUCCESS) return;
    this.#leave();
    throw this.#unavailable();
  }

  /** Gives the hypervisor up. One that is silent would be waited for again by every single step of detaching. */
  #leave(): void {
    this.#gone = true;
    if (this.#socket !== undefined) cutConnection(this.#socket);
  }

  #unavailable(): MemtablesError {
    return new MemtablesError(
      'HYPERVISOR_GONE',
      this.#closed ? 'the session is closed' : 'the hypervisor has gone away or answers no more',
      { remedy: 'Attach again; a journal that was left behind lists what is still in the guest.' },
    );
  }

  #assertAlive(): void {
    if (this.#closed || this.#gone) throw this.#unavailable();
  }

  /** Inside a handler, libvmi's resume waits for ever for the vCPU that waits for the handler's answer. */
  #assertOutsideHandler(method: string): void {
    this.#assertAlive();
    if (this.#events.inHandler) throw refusedInHandler(method);
  }

  /** A vCPU that runs, or whose violation is being handled, may have decoded what a write replaces. */
  #assertMayWrite(method: string): void {
    this.#assertOutsideHandler(method);
    if (this.#pauses > 0) return;
    throw new MemtablesError('NOT_QUIESCENT', `${method} was called while the guest runs`, {
      remedy: 'Write inside whileQuiescent.',
    });
  }

  #assertInMemory(gpa: Gpa, length: number): void {
    const inside =
      Number.isInteger(length) && length >= 0 && gpa >= 0n && gpa + BigInt(length) <= this.maxPhysicalAddress;
    if (inside) return;
    throw new MemtablesError(
      'HYPERVISOR_FAILED',
      `the guest has no memory of ${length} bytes at ${hex(gpa)}`,
      {
        remedy: 'A page table or structure of the guest holds an impossible address.',
        context: { gpa, length, maxPhysicalAddress: this.maxPhysicalAddress },
      },
    );
  }
}

function assertNotStuck(deadline: number): void {
  if (performance.now() <= deadline) return;
  throw new MemtablesError(
    'HYPERVISOR_STUCK',
    'a vCPU did not finish the instruction that it was to emulate or to step over',
    {
      remedy: 'Check that the hypervisor lets every vCPU run, and reports single steps.',
      context: { limitMs: STEP_MS },
    },
  );
}

function unsupportedPaging(context: Record<string, unknown>): MemtablesError {
  return new MemtablesError('GUEST_UNSUPPORTED', 'the guest does not run with 4-level paging', {
    remedy: 'Only 64-bit guests with 4-level paging are supported; attach once the guest has booted.',
    context,
  });
}

function tooManyVcpus(vcpus: number, most: number): MemtablesError {
  return new MemtablesError(
    'GUEST_UNSUPPORTED',
    `the guest has ${vcpus} vCPUs, and only ${most} can be stepped`,
    {
      remedy: `On Xen, attach to guests with at most ${most} vCPUs.`,
      context: { vcpus, most },
    },
  );
}

function refusedInHandler(method: string): MemtablesError {
  return new MemtablesError('NOT_QUIESCENT', `${method} was called inside a violation handler`, {
    remedy: 'Note what is to be done, and do it after listen has returned.',
    context: { method },
  });
}

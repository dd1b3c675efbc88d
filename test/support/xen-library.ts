import koffi from 'koffi';
import { translate } from '../../src/host/page-walk.js';
import * as abi from '../../src/libvmi/abi.js';
import type { Libvmi } from '../../src/libvmi/library.js';
import { NativeBlock } from '../../src/libvmi/native-block.js';
import { decodeAccesses, type MemoryAccess, memoryAccesses } from '../../src/machine/accesses.js';
import {
  ACCESS_EXECUTE,
  ACCESS_READ,
  ACCESS_WRITE,
  type Machine,
  type Trap,
} from '../../src/machine/machine.js';
import { gfnOf, pageOffset } from '../../src/vmi/address.js';
import type { Registers } from '../../src/x86/registers.js';
import { type Advance, freeRunning } from './machine-hypervisor.js';

const CALLBACK = koffi.proto('uint32_t', ['void *', 'void *']);
const INSTANCE = 1n;
const FAILURE = 1;
const ACCESSES = { read: abi.ACCESS_READ, write: abi.ACCESS_WRITE, execute: abi.ACCESS_EXECUTE } as const;
const FULL_ACCESS = ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE;

/**
 * libvmi's C ABI over the embedded machine, with events answered as Xen answers them: NONE lets the instruction fault
 * again; EMULATE carries out what memory holds at RIP once the vCPU runs again, whatever the permissions; the data of an answer has no
 * address, and each read of the instruction gets it from its first byte on, with zeros behind its end; a single step
 * is toggled by an answer; a guest can be paused inside a callback, and is at once. Without a monitor trap flag no
 * event of single steps can be registered.
 */
export class XenLibrary implements Libvmi {
  readonly path = 'a library for Xen';
  advance: Advance = freeRunning;
  /** How the events were answered so far. */
  readonly answers = { again: 0, emulated: 0, withData: 0, steps: 0 };
  readonly functions: Libvmi['functions'];
  readonly #events: bigint[] = [];
  readonly #registers = new NativeBlock(abi.REGISTERS_SIZE);
  readonly #stepping: boolean[];
  #open: Trap[] = [];
  /** What vCPUs do first when they run again. */
  #emulations: (() => void)[] = [];
  #pauses = 0;

  constructor(
    private readonly machine: Machine,
    { trapFlag = true } = {},
  ) {
    this.#stepping = Array.from({ length: machine.vcpuCount }, () => false);
    const all = abi.EVERY_PAGE_TABLE;
    this.functions = {
      vmi_events_version: () => abi.EVENTS_VERSION,
      vmi_init: (instance, mode) => {
        if (mode !== abi.MODE_XEN) return FAILURE;
        new DataView((instance as Uint8Array).buffer).setBigUint64(0, INSTANCE, true);
        return abi.STATUS_SUCCESS;
      },
      vmi_init_paging: () => abi.PAGE_MODE_IA32E,
      vmi_destroy: () => abi.STATUS_SUCCESS,
      vmi_get_num_vcpus: () => machine.vcpuCount,
      vmi_get_max_physical_address: () => BigInt(machine.memoryBytes),
      vmi_pause_vm: () => this.#pause(),
      vmi_resume_vm: () => this.#resume(),
      vmi_read_pa: (_vmi, gpa, count, bytes) => {
        (bytes as Uint8Array).set(machine.readPhysical(BigInt(gpa as bigint), count as number));
        return abi.STATUS_SUCCESS;
      },
      vmi_write_pa: (_vmi, gpa, _count, bytes) => {
        if (this.#pauses === 0) throw new Error('a write while the guest runs');
        machine.writePhysical(BigInt(gpa as bigint), bytes as Uint8Array);
        return abi.STATUS_SUCCESS;
      },
      vmi_pagetable_lookup: (_vmi, table, gva, word) => {
        const gpa = translate(machine, table as bigint, gva as bigint);
        if (gpa === undefined) return FAILURE;
        new DataView((word as Uint8Array).buffer).setBigUint64(0, gpa, true);
        return abi.STATUS_SUCCESS;
      },
      vmi_pagecache_flush: () => 0,
      vmi_v2pcache_flush: (_vmi, table) => (table === all ? 0 : FAILURE),
      vmi_get_vcpuregs: (_vmi, into, vcpu) => {
        writeRegisters(new DataView(koffi.view(into, abi.REGISTERS_SIZE)), machine.registers(vcpu as number));
        return abi.STATUS_SUCCESS;
      },
      vmi_set_vcpuregs: (_vmi, from, vcpu) => {
        if (this.#pauses === 0) throw new Error('registers set while the guest runs');
        const view = new DataView(koffi.view(from, abi.REGISTERS_SIZE));
        const settable = Object.entries(abi.REGISTER_OFFSETS).filter(([name]) =>
          abi.isSettable(name as keyof Registers),
        );
        const values = settable.map(([name, offset]) => [name, view.getBigUint64(offset, true)]);
        machine.setRegisters(vcpu as number, Object.fromEntries(values));
        return abi.STATUS_SUCCESS;
      },
      vmi_register_event: (_vmi, event) => {
        const type = eventView(event as bigint).getUint16(abi.EVENT.type, true);
        if (type === abi.EVENT_TYPE_SINGLE_STEP && !trapFlag) return FAILURE;
        this.#events.push(event as bigint);
        return abi.STATUS_SUCCESS;
      },
      vmi_set_mem_event: (_vmi, gfn, trapped) => {
        machine.setAccess(gfn as bigint, FULL_ACCESS & ~((trapped as number) >> 1));
        return abi.STATUS_SUCCESS;
      },
      vmi_events_listen: (_vmi, timeout) => this.#listen(timeout as number),
    };
  }

  /** Whether a vCPU is being stepped. */
  get stepping(): boolean {
    return this.#stepping.includes(true);
  }

  /** Takes the traps that the test itself has provoked. */
  deliver(traps: readonly Trap[]): void {
    this.#open.push(...traps);
  }

  #pause(): number {
    this.#pauses++;
    for (let vcpu = 0; vcpu < this.machine.vcpuCount; vcpu++) this.machine.pause(vcpu);
    return abi.STATUS_SUCCESS;
  }

  #resume(): number {
    if (this.#pauses === 0) return FAILURE;
    this.#pauses--;
    for (let vcpu = 0; vcpu < this.machine.vcpuCount; vcpu++) this.machine.resume(vcpu);
    return abi.STATUS_SUCCESS;
  }

  #listen(timeoutMs: number): number {
    const end = performance.now() + timeoutMs;
    const emulations = this.#pauses === 0 ? this.#emulations.splice(0) : [];
    for (const emulate of emulations) emulate();
    const runs = emulations.length === 0 && this.#pauses === 0;
    while (runs && this.#open.length === 0 && performance.now() < end) {
      this.#open.push(...this.advance(this.machine));
    }
    for (const trap of this.#open.splice(0)) this.#answer(trap);
    return abi.STATUS_SUCCESS;
  }

  #answer(trap: Trap): void {
    const type = trap.kind === 'single-step' ? abi.EVENT_TYPE_SINGLE_STEP : abi.EVENT_TYPE_MEMORY;
    const address = this.#events.find((event) => eventView(event).getUint16(abi.EVENT.type, true) === type);
    if (address === undefined) throw new Error('an event that nobody has registered for');
    const event = eventView(address);
    writeRegisters(this.#registers.view, this.machine.registers(trap.vcpu));
    event.setUint32(abi.EVENT.vcpu, trap.vcpu, true);
    if (type === abi.EVENT_TYPE_MEMORY) {
      event.setBigUint64(abi.EVENT.gfn, gfnOf(trap.gpa), true);
      event.setUint8(abi.EVENT.outAccess, ACCESSES[trap.access]);
      event.setBigUint64(abi.EVENT.gla, trap.gva, true);
      event.setBigUint64(abi.EVENT.offset, BigInt(pageOffset(trap.gpa)), true);
    }
    event.setBigUint64(abi.EVENT.registersOrReadData, this.#registers.address, true);
    const flags: number = koffi.call(
      event.getBigUint64(abi.EVENT.callback, true),
      CALLBACK,
      INSTANCE,
      address,
    );
    if ((flags & abi.RESPONSE_TOGGLE_SINGLE_STEP) !== 0) this.#toggleStep(trap.vcpu);
    if (trap.kind === 'single-step') {
      this.answers.steps++;
      this.machine.complete(trap.vcpu);
      return;
    }
    const withData = (flags & abi.RESPONSE_SET_READ_DATA) !== 0;
    const denied = (this.machine.access(gfnOf(trap.gpa)) & (ACCESSES[trap.access] >> 1)) === 0;
    // What is allowed by now is not emulated but run.
    const emulates = denied && (withData || (flags & abi.RESPONSE_EMULATE) !== 0);
    if (!emulates) {
      this.answers.again++;
      this.machine.retry(trap.vcpu);
      return;
    }
    this.answers[withData ? 'withData' : 'emulated']++;
    const data = withData ? readData(event.getBigUint64(abi.EVENT.registersOrReadData, true)) : undefined;
    this.#emulations.push(() => this.#emulate(trap, data));
  }

  #toggleStep(vcpu: number): void {
    if (this.#events.length < 2) throw new Error('a single step without a monitor trap flag');
    this.#stepping[vcpu] = !this.#stepping[vcpu];
    this.machine.setSingleStep(vcpu, this.#stepping[vcpu]!);
  }

  #isStillThere({ vcpu, rip, instruction }: Trap): boolean {
    const { cr3 } = this.machine.registers(vcpu);
    return instruction.every((byte, index) => {
      const gpa = translate(this.machine, cr3, rip + BigInt(index));
      return gpa !== undefined && this.machine.readPhysical(gpa, 1)[0] === byte;
    });
  }

  /** All of the instruction, past every permission. */
  #emulate(trap: Trap, data: Uint8Array | undefined): void {
    // The emulator decodes what is at RIP by now; another instruction is as good as one that runs again.
    if (!this.#isStillThere(trap)) {
      this.machine.retry(trap.vcpu);
      return;
    }
    const accesses = memoryAccesses(decodeAccesses(trap.instruction), this.machine.registers(trap.vcpu));
    for (let piece: Trap | undefined = trap; piece !== undefined; ) {
      this.machine.complete(trap.vcpu, data && emulatedRead(piece, accesses, data));
      const next: Trap | undefined = this.machine.step(trap.vcpu, 0).trap;
      // The monitor trap flag tells of instructions that the processor has run, so that it is the next one's turn.
      if (next?.kind === 'single-step') this.machine.complete(trap.vcpu);
      piece = next?.kind === 'violation' ? next : undefined;
    }
  }
}

function eventView(address: bigint): DataView {
  return new DataView(koffi.view(address, abi.EVENT.size));
}

function readData(address: bigint): Uint8Array {
  const view = new DataView(koffi.view(address, abi.READ_DATA.size));
  const length = view.getUint32(abi.READ_DATA.length, true);
  return Uint8Array.from(new Uint8Array(view.buffer, abi.READ_DATA.bytes, length));
}

/** What Xen's emulator takes for one piece of a read: the data from the start of its operand on. */
function emulatedRead(piece: Trap, accesses: readonly MemoryAccess[], data: Uint8Array): Uint8Array {
  const operand = accesses.find(
    ({ read, gva, length }) => read && piece.gva >= gva && piece.gva < gva + BigInt(length),
  );
  const from = Number(piece.gva - (operand?.gva ?? piece.gva));
  const bytes = new Uint8Array(piece.length);
  bytes.set(data.subarray(from, from + piece.length));
  return bytes;
}

function writeRegisters(view: DataView, registers: Registers): void {
  for (const [name, offset] of Object.entries(abi.REGISTER_OFFSETS)) {
    view.setBigUint64(offset, registers[name as keyof Registers], true);
  }
}

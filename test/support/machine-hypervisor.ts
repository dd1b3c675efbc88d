import { MemtablesError } from '../../src/errors.js';
import { translate } from '../../src/host/page-walk.js';
import {
  ACCESS_EXECUTE,
  ACCESS_READ,
  ACCESS_WRITE,
  type Machine,
  type Trap,
} from '../../src/machine/machine.js';
import { type Gfn, type Gpa, type Gva, hex } from '../../src/vmi/address.js';
import type { Hypervisor, ViolationHandler } from '../../src/vmi/hypervisor.js';
import type { GprName, Registers } from '../../src/x86/registers.js';

const FULL_ACCESS = ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE;

/** Lets the machine's vCPUs run a little; returns the traps that are new. */
export type Advance = (machine: Machine) => readonly Trap[];

export const freeRunning: Advance = (machine) => machine.run(500).traps;

/** The embedded machine as a hypervisor, in this process: no library and no socket between. */
export class MachineHypervisor implements Hypervisor {
  readonly vcpuCount: number;
  readonly maxPhysicalAddress: Gpa;
  /** How the guest advances while `listen` waits; a test may put a schedule of its own here. */
  advance: Advance;
  /** The first trap for which this holds is not answered before the test delivers it. */
  holdBack: (trap: Trap) => boolean = () => false;
  heldBack: Trap | undefined;
  readonly #machine: Machine;
  readonly #trapped = new Set<Gfn>();
  #handler: ViolationHandler | undefined;
  #open: Trap[] = [];
  #paused = 0;

  constructor(machine: Machine, advance: Advance = freeRunning) {
    this.#machine = machine;
    this.advance = advance;
    this.vcpuCount = machine.vcpuCount;
    this.maxPhysicalAddress = BigInt(machine.memoryBytes);
  }

  readPhysical(gpa: Gpa, length: number): Uint8Array {
    return this.#machine.readPhysical(gpa, length);
  }

  writePhysical(gpa: Gpa, bytes: Uint8Array): void {
    if (this.#paused === 0 || this.#open.length > 0) {
      throw new MemtablesError(
        'HYPERVISOR_FAILED',
        `a write to ${hex(gpa)} while the guest was not quiescent`,
        {
          remedy: 'Write in the work step only.',
        },
      );
    }
    this.#machine.writePhysical(gpa, bytes);
  }

  translate(pageTable: Gpa, gva: Gva): Gpa | undefined {
    return translate(this.#machine, pageTable, gva);
  }

  flushCaches(): void {}

  registers(vcpu: number): Registers {
    return this.#machine.registers(vcpu);
  }

  setRegisters(vcpu: number, registers: Registers): void {
    const { rip, rflags } = registers;
    this.#machine.setRegisters(vcpu, { ...pickGprs(registers), rip, rflags });
  }

  pause(): void {
    this.#paused++;
    for (let vcpu = 0; vcpu < this.vcpuCount; vcpu++) this.#machine.pause(vcpu);
  }

  resume(): void {
    this.#paused--;
    for (let vcpu = 0; vcpu < this.vcpuCount; vcpu++) this.#machine.resume(vcpu);
  }

  trapAccess(gfn: Gfn): void {
    this.#trapped.add(gfn);
    this.#machine.setAccess(gfn, ACCESS_EXECUTE);
  }

  releaseAccess(gfn: Gfn): void {
    this.#trapped.delete(gfn);
    this.#machine.setAccess(gfn, FULL_ACCESS);
  }

  onViolation(handler: ViolationHandler | undefined): void {
    this.#handler = handler;
  }

  listen(timeoutMs: number): number {
    const end = performance.now() + timeoutMs;
    let handled = this.#answerAll();
    while (handled === 0 && this.#paused === 0 && performance.now() < end) {
      this.#open.push(...this.advance(this.#machine).filter((trap) => !this.#heldBack(trap)));
      handled = this.#answerAll();
    }
    return handled;
  }

  close(): void {
    this.#answerAll();
    for (const gfn of [...this.#trapped]) this.releaseAccess(gfn);
  }

  get trappedFrames(): Gfn[] {
    return [...this.#trapped];
  }

  get paused(): boolean {
    return this.#paused > 0;
  }

  #heldBack(trap: Trap): boolean {
    if (this.heldBack === undefined && this.holdBack(trap)) this.heldBack = trap;
    return trap === this.heldBack;
  }

  /** Takes the traps that the test itself has provoked. */
  deliver(traps: readonly Trap[]): void {
    this.#open.push(...traps);
  }

  #answerAll(): number {
    const traps = this.#open;
    this.#open = [];
    for (const trap of traps) {
      const registers = this.#machine.registers(trap.vcpu);
      const answer = this.#handler?.({
        vcpu: trap.vcpu,
        rip: trap.rip,
        gva: trap.gva,
        gpa: trap.gpa,
        read: trap.access === 'read',
        write: trap.access === 'write',
        execute: trap.access === 'execute',
        register: (name) => registers[name],
      });
      this.#machine.complete(trap.vcpu, answer);
      // A crossing read has a second piece, which is part of the instruction under way.
      const rest = this.#machine.step(trap.vcpu, 0).trap;
      if (rest !== undefined) this.#open.push(rest);
    }
    return traps.length;
  }
}

function pickGprs(registers: Registers): Record<GprName, bigint> {
  const { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 } = registers;
  return { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 };
}

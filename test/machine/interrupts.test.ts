import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Machine } from '../../src/machine/machine.js';
import type { Gva } from '../../src/vmi/address.js';
import {
  CODE,
  createFlatMachine,
  DATA,
  handlerOf,
  hexBytes,
  interruptStackOf,
  KERNEL_BASE,
  kernelStackOf,
  SCRATCH,
  SELECTORS,
  setGate,
} from './support.js';

const ENABLED = 0x202n;
const DISABLED = 0x2n;
const INTERRUPT_FLAG = 0x200n;
const HANDLER = KERNEL_BASE + SCRATCH;
const VECTOR = 0x40;

let machine: Machine;
beforeEach(() => {
  machine = createFlatMachine({ vcpus: 2 });
});
afterEach(() => machine.close());

type Mode = 'stepped' | 'free running';
const MODES = ['stepped', 'free running'] as const;

function start(code: string, registers: Parameters<Machine['setRegisters']>[1] = {}, vcpu = 0): void {
  machine.writePhysical(CODE, hexBytes(code));
  machine.setRegisters(vcpu, { rip: CODE, ...registers });
}

function runToHalt(mode: Mode, vcpu = 0): void {
  if (mode === 'stepped') machine.step(vcpu, 1_000_000);
  else while (!machine.run(10_000).idle);
}

/** The vector whose default handler the vCPU has halted in. */
function handledBy(vcpu = 0): number {
  return Number((machine.registers(vcpu).rip - handlerOf(machine, 0)) / 0x10n);
}

/** What the CPU has pushed, in the order of the addresses; `skip` bytes above RSP. */
function frame(skip = 0): Record<'rip' | 'cs' | 'rflags' | 'rsp' | 'ss', bigint> {
  const { rsp } = machine.registers(0);
  const bytes = machine.readPhysical(rsp - KERNEL_BASE + BigInt(skip), 40);
  const [rip, cs, rflags, stack, ss] = [0, 8, 16, 24, 32].map((at) => bytes.readBigUInt64LE(at));
  return { rip: rip!, cs: cs!, rflags: rflags!, rsp: stack!, ss: ss! };
}

describe.each(MODES)('an interrupt (%s)', (mode) => {
  // Free running, a vCPU looks for what IF and CR8 have come to allow at the end of its slice only.
  const exactly = (name: string, test: () => void) => {
    if (mode === 'stepped') it(name, test);
  };

  exactly('waits for IF, and is taken behind the instruction that follows STI', () => {
    start('90 90 fb 90 90 f4', { rflags: DISABLED });
    machine.raiseInterrupt(0, VECTOR);
    runToHalt(mode);
    expect(handledBy()).toBe(VECTOR);
    expect(frame()).toEqual({
      rip: CODE + 4n,
      cs: SELECTORS.kernelCode,
      rflags: ENABLED,
      rsp: kernelStackOf(machine, 0),
      ss: SELECTORS.kernelData,
    });
    expect(machine.registers(0).rflags & INTERRUPT_FLAG).toBe(0n);
  });

  exactly('is not taken between MOV SS and the instruction that needs the new stack', () => {
    // mov ax, ss; sti; mov ss, ax; mov rsp, rbx; nop; hlt
    start('668cd0 fb 8ed0 4889dc 90 f4', { rbx: KERNEL_BASE + DATA });
    machine.raiseInterrupt(0, VECTOR);
    runToHalt(mode);
    expect(frame()).toMatchObject({ rip: CODE + 9n, rsp: KERNEL_BASE + DATA });
  });

  it('finds RSP aligned to 16, and IRETQ gives the old one back', () => {
    setGate(machine, VECTOR, HANDLER);
    // mov rbx, rsp; iretq
    machine.writePhysical(SCRATCH, hexBytes('4889e3 48cf'));
    const rsp = kernelStackOf(machine, 0) - 5n;
    start('90 f4', { rflags: ENABLED, rsp });
    machine.raiseInterrupt(0, VECTOR);
    runToHalt(mode);
    expect(machine.registers(0)).toMatchObject({
      rip: CODE + 2n,
      rsp,
      rflags: ENABLED,
      rbx: (rsp & ~0xfn) - 40n,
    });
  });

  exactly('of a lower class than CR8 waits until the guest lowers it', () => {
    // mov eax, 4; mov cr8, rax; sti; nop; nop; mov eax, 3; mov cr8, rax; hlt
    start('b804000000440f22c0 fb 90 90 b803000000440f22c0 f4', { rflags: DISABLED });
    machine.raiseInterrupt(0, VECTOR);
    runToHalt(mode);
    expect(handledBy()).toBe(VECTOR);
    expect(frame().rip).toBe(CODE + 21n);
  });

  exactly('of a higher class than CR8 does not wait', () => {
    start('b804000000440f22c0 fb 90 90 f4', { rflags: DISABLED });
    machine.raiseInterrupt(0, 0x51);
    runToHalt(mode);
    expect(frame().rip).toBe(CODE + 11n);
  });

  exactly('with the higher vector comes first, the other behind it', () => {
    setGate(machine, 0x61, HANDLER);
    machine.writePhysical(SCRATCH, hexBytes('ffc1 48cf'));
    start('90 f4', { rflags: ENABLED, rcx: 0n });
    machine.raiseInterrupt(0, VECTOR);
    machine.raiseInterrupt(0, 0x61);
    machine.raiseInterrupt(0, 0x61);
    runToHalt(mode);
    expect(handledBy()).toBe(VECTOR);
    // Raised twice before it was taken is once.
    expect(machine.registers(0).rcx).toBe(1n);
    expect(frame().rip).toBe(CODE);
  });

  it('wakes a halted vCPU if it may be taken, and only then', () => {
    start('fa f4 90', { rflags: ENABLED });
    runToHalt(mode);
    machine.raiseInterrupt(0, VECTOR);
    expect(machine.step(0, 1)).toEqual({ retired: 0 });
    expect(machine.run(1000)).toEqual({ traps: [], idle: true });
    expect(machine.registers(0).rip).toBe(CODE + 2n);
    start('fb f4 90', { rflags: DISABLED });
    runToHalt(mode);
    expect(handledBy()).toBe(VECTOR);
    expect(frame().rip).toBe(CODE + 2n);
  });

  it('on a gate with IST changes the stack even in kernel mode', () => {
    setGate(machine, VECTOR, handlerOf(machine, VECTOR), { ist: 1 });
    start('90 f4', { rflags: ENABLED });
    machine.raiseInterrupt(0, VECTOR);
    runToHalt(mode);
    expect(machine.registers(0).rsp).toBe(interruptStackOf(machine, 0) - 40n);
    expect(frame()).toMatchObject({ rip: CODE, rsp: kernelStackOf(machine, 0), ss: SELECTORS.kernelData });
  });

  exactly('from user mode comes in on RSP0, with a null SS, and IRETQ goes back there', () => {
    setGate(machine, VECTOR, HANDLER);
    setGate(machine, 0x80, handlerOf(machine, 0x80), { privilege: 3 });
    // mov rbx, rsp; mov r12, cs; mov r13, ss; mov r14, [rsp+8]; iretq
    machine.writePhysical(SCRATCH, hexBytes('4889e3 418ccc 418cd5 4c8b742408 48cf'));
    const user = CODE + 0x100n;
    // nop; int 0x80
    machine.writePhysical(user, hexBytes('90 cd80'));
    // iretq; the frame is at RSP
    start('48cf', { rsp: DATA, rflags: DISABLED });
    const toUser = Buffer.alloc(40);
    for (const [index, value] of [
      user,
      SELECTORS.userCode,
      ENABLED,
      DATA + 0x800n,
      SELECTORS.userData,
    ].entries()) {
      toUser.writeBigUInt64LE(value, index * 8);
    }
    machine.writePhysical(DATA, toUser);
    machine.raiseInterrupt(0, VECTOR);
    runToHalt(mode);
    expect(handledBy()).toBe(0x80);
    expect(machine.registers(0)).toMatchObject({
      rbx: kernelStackOf(machine, 0) - 40n,
      r12: SELECTORS.kernelCode,
      r13: 0n,
      r14: SELECTORS.userCode,
      cs: SELECTORS.kernelCode,
    });
    expect(frame()).toEqual({
      rip: user + 3n,
      cs: SELECTORS.userCode,
      rflags: ENABLED,
      rsp: DATA + 0x800n,
      ss: SELECTORS.userData,
    });
  });

  it('between two elements of a repeated instruction continues it afterwards', () => {
    setGate(machine, VECTOR, HANDLER);
    // mov r15, rcx; iretq
    machine.writePhysical(SCRATCH, hexBytes('4989cf 48cf'));
    start('f3aa f4', { rflags: ENABLED, rcx: 10n, rdi: DATA, rax: 0x77n });
    machine.step(0, 4);
    machine.raiseInterrupt(0, VECTOR);
    runToHalt(mode);
    expect(machine.registers(0)).toMatchObject({ r15: 6n, rcx: 0n, rdi: DATA + 10n, rip: CODE + 3n });
    expect(machine.readPhysical(DATA, 11)).toEqual(Buffer.concat([Buffer.alloc(10, 0x77), Buffer.alloc(1)]));
  });

  it('waits while its vCPU is paused, and does not go to another', () => {
    start('90 f4', { rflags: ENABLED });
    machine.setRegisters(1, { rip: CODE, rflags: ENABLED });
    machine.pause(0);
    machine.raiseInterrupt(0, VECTOR);
    runToHalt(mode);
    runToHalt(mode, 1);
    expect(machine.registers(0).rip).toBe(CODE);
    expect(machine.registers(1).rip).toBe(CODE + 2n);
    machine.resume(0);
    runToHalt(mode);
    expect(handledBy(0)).toBe(VECTOR);
    expect(machine.registers(1).rip).toBe(CODE + 2n);
  });

  it('is taken though the vCPU spins in one block', () => {
    // sti; spin
    start('fb 90 ebfe', { rflags: DISABLED });
    machine.raiseInterrupt(0, VECTOR);
    runToHalt(mode);
    expect(handledBy()).toBe(VECTOR);
  });
});

describe('the timer', () => {
  /** Counts the vCPU's ticks in r15: inc r15; iretq. */
  function countTicks(): void {
    setGate(machine, VECTOR, HANDLER);
    machine.writePhysical(SCRATCH, hexBytes('49ffc7 48cf'));
  }

  it('comes to every vCPU, running or halted, until it is stopped', () => {
    countTicks();
    // 0: spin; 1: wait for an interrupt for ever
    start('ebfe', { rflags: ENABLED, r15: 0n });
    machine.writePhysical(DATA, hexBytes('f4 ebfd'));
    machine.setRegisters(1, { rip: DATA, rflags: ENABLED, r15: 0n });
    machine.setTimer(VECTOR, 100);
    const ticks = () => [0, 1].map((vcpu) => machine.registers(vcpu).r15);
    while (ticks().some((count) => count < 10n)) machine.run(1000);
    machine.setTimer(VECTOR, 0);
    // What was raised and not yet taken is taken still.
    machine.run(1000);
    const last = ticks();
    machine.run(3000);
    expect(ticks()).toEqual(last);
  });

  it('does not tick while the vCPUs are stepped', () => {
    countTicks();
    start('ebfe', { rflags: ENABLED, r15: 0n });
    machine.setTimer(VECTOR, 1);
    machine.step(0, 10_000);
    expect(machine.registers(0).r15).toBe(0n);
  });

  it('interrupts between instructions only: whatever it interrupts computes the same', () => {
    // A handler that leaves no trace: push rax; mov eax, 5; add al, 0x80; pop rax; iretq
    setGate(machine, VECTOR, HANDLER);
    machine.writePhysical(SCRATCH, hexBytes('50 b805000000 0480 58 48cf'));
    // loop: add rax, rcx; adc rdx, 3; lea rbx, [rax+rdx]; xor rdx, rbx; push rdx; pop rsi; dec rcx; jnz loop;
    // end: hlt; jmp end
    const loop = '4801c8 4883d203 488d1c10 4831da 52 5e 48ffc9 75eb f4 ebfd';
    const work = () => {
      start(loop, { rflags: ENABLED, rax: 1n, rcx: 300_000n, rdx: 2n });
      while (machine.registers(0).rip !== CODE + 22n) machine.run(10_000);
      return machine.registers(0);
    };
    const calm = work();
    machine.setTimer(VECTOR, 20);
    const interrupted = work();
    expect(interrupted).toEqual(calm);
  });
});

it('vectors of exceptions cannot be raised as interrupts', () => {
  for (const refused of [() => machine.raiseInterrupt(0, 14), () => machine.setTimer(2, 100)]) {
    expect(refused).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
  }
});

it('a handler may be anywhere in the upper half', () => {
  const far: Gva = KERNEL_BASE + DATA + 0xabcn;
  setGate(machine, 0xff, far);
  machine.writePhysical(DATA + 0xabcn, hexBytes('f4'));
  start('90', { rflags: ENABLED });
  machine.raiseInterrupt(0, 0xff);
  machine.step(0, 1);
  expect(machine.registers(0).rip).toBe(far + 1n);
});

import { describe, expect, it } from 'vitest';
import { discoverKernel } from '../../src/nt/kernel.js';
import { FunctionTable } from '../../src/nt/pdata.js';
import { type Process, processes } from '../../src/nt/processes.js';
import { findProcessor } from '../../src/nt/processors.js';
import { type Thread, threads } from '../../src/nt/threads.js';
import type { Gva } from '../../src/vmi/address.js';
import { whileQuiescent } from '../../src/vmi/quiescence.js';
import { inUserMode } from '../../src/x86/registers.js';
import { SteppedGuest, type SteppedOptions } from './stepped-guest.js';

const STACK_BYTES = 0x6000n;
const KERNEL_CODE = 0x10;
const INTERRUPT_FLAG = 0x200;
/** KTHREAD_STATE and KWAIT_REASON, as NT numbers them. */
const State = { ready: 1, running: 2, waiting: 5 } as const;
const WaitReason = { delayExecution: 4, quantumEnd: 30, dispatchInterrupt: 31 } as const;
const TICKS = 150;
const STEPS_PER_TICK = 500;

function bootedGuest(options: SteppedOptions) {
  const guest = SteppedGuest.boot(options);
  const kernel = whileQuiescent(guest.hypervisor, () => discoverKernel(guest.hypervisor, guest.profile));
  const vcpus = Array.from({ length: guest.machine.vcpuCount }, (_, vcpu) => vcpu);
  const processor = (vcpu: number) => findProcessor(kernel, vcpu, guest.machine.registers(vcpu))!;
  const all = () => [...processes(kernel)].flatMap((process) => [...threads(kernel, process)]);
  const offset = (type: string, field: string) => BigInt(guest.profile.offset(type, field));
  const list = (head: Gva) => {
    const entries: Gva[] = [];
    for (let entry = guest.readU64(head); entry !== head; entry = guest.readU64(entry)) entries.push(entry);
    return entries;
  };
  const waitReasonOf = ({ gva }: Thread) => guest.read(gva + offset('_KTHREAD', 'WaitReason'), 1).readUInt8();
  const directoryTable = ({ gva }: Process) => guest.readU64(gva + offset('_KPROCESS', 'DirectoryTableBase'));
  return { guest, kernel, vcpus, processor, all, offset, list, waitReasonOf, directoryTable };
}

type Booted = ReturnType<typeof bootedGuest>;

/** UWOP_*. */
const Unwind = { pushNonvolatile: 0, allocateLarge: 1, allocateSmall: 2, pushMachineFrame: 10 } as const;

/** Unwinds a thread that was switched away from, up to the machine frame of the interrupt, as a debugger does. */
function interruptedContext({ guest, kernel }: Booted, thread: Thread) {
  const functions = FunctionTable.read(kernel.image);
  let rva = kernel.symbolRva('SwapContext');
  for (let rsp = thread.kernelStack; ; rsp += 8n) {
    const entry = functions.entryAt(rva)!;
    const [, , count] = kernel.image.read(entry.unwind, 4);
    const codes = Buffer.from(kernel.image.read(entry.unwind + 4, count! * 2));
    for (let at = 0; at < codes.length; at += 2) {
      const [operation, info] = [codes[at + 1]! & 15, codes[at + 1]! >> 4];
      if (operation === Unwind.pushNonvolatile) rsp += 8n;
      else if (operation === Unwind.allocateSmall) rsp += BigInt(info * 8 + 8);
      else if (operation === Unwind.allocateLarge) {
        at += 2;
        expect(info).toBe(0);
        rsp += BigInt(codes.readUInt16LE(at) * 8);
      } else {
        expect(operation).toBe(Unwind.pushMachineFrame);
        const [rip, cs, eflags, stack] = [0n, 8n, 16n, 24n].map((offset) => guest.readU64(rsp + offset));
        return { rip: rip!, cs: Number(cs), eflags: Number(eflags), rsp: stack! };
      }
    }
    rva = Number(guest.readU64(rsp) - kernel.base);
  }
}

describe('preemption', () => {
  it('leaves a trap frame with kernel CS on the stack, and the RIP that goes on when the thread does', () => {
    const booted = bootedGuest({ vcpus: 2, seed: 71 });
    const { guest, kernel, processor, all, vcpus } = booted;
    const seen = { kernel: 0, user: 0, resumed: 0, reasons: new Set<number>() };
    const waiting = new Map<Gva, { rip: Gva; rsp: Gva }>();
    for (let round = 0; round < TICKS; round++) {
      const vcpu = round % vcpus.length;
      guest.tick(vcpu);
      const { currentThread: before } = processor(vcpu);
      const interrupted = guest.machine.registers(vcpu);
      // To the end of the interrupt: a switch, or the return.
      const landed = until(guest, vcpu, () => {
        const { rip, rsp } = guest.machine.registers(vcpu);
        if (![...waiting.values()].some((frame) => frame.rip === rip && frame.rsp === rsp)) return false;
        return waiting.get(processor(vcpu).currentThread)?.rsp === rsp;
      });
      if (landed) {
        seen.resumed++;
        waiting.delete(processor(vcpu).currentThread);
      }
      for (const thread of all()) {
        const { state, gva } = thread;
        const waitReason = booted.waitReasonOf(thread);
        const isCurrent = vcpus.some((each) => processor(each).currentThread === gva);
        if (state !== State.ready || isCurrent) continue;
        if (waitReason !== WaitReason.quantumEnd && waitReason !== WaitReason.dispatchInterrupt) continue;
        seen.reasons.add(waitReason);
        const frame = interruptedContext(booted, thread);
        expect(frame.eflags & INTERRUPT_FLAG).toBe(INTERRUPT_FLAG);
        if ((frame.cs & 3) === 3) {
          expect(frame.rip).toBeLessThan(kernel.base);
          seen.user++;
          continue;
        }
        expect(frame.cs).toBe(KERNEL_CODE);
        expect(frame.rip > kernel.base && frame.rip < kernel.end).toBe(true);
        expect(frame.rsp > thread.stackLimit && frame.rsp < thread.stackBase).toBe(true);
        if (gva === before && !inUserMode(interrupted)) seen.kernel++;
        waiting.set(gva, frame);
      }
    }
    expect(seen.kernel).toBeGreaterThan(10);
    expect(seen.user).toBeGreaterThan(0);
    expect(seen.resumed).toBeGreaterThan(10);
    expect([...seen.reasons].sort()).toEqual([WaitReason.quantumEnd, WaitReason.dispatchInterrupt]);
  });

  function until(guest: SteppedGuest, vcpu: number, condition: () => boolean): boolean {
    for (let step = 0; step < STEPS_PER_TICK; step++) {
      guest.machine.step(vcpu, 1);
      if (condition()) return true;
    }
    return false;
  }
});

describe('threads', () => {
  it.each([1, 2, 4])('are in the lists that NT keeps them in, with %i vCPUs', (vcpuCount) => {
    const booted = bootedGuest({ vcpus: vcpuCount, seed: 72 });
    const { guest, kernel, vcpus, processor, all, offset, list, waitReasonOf, directoryTable } = booted;
    const seen = new Set<number>();
    for (let round = 0; round < 40; round++) {
      guest.round(700);
      const current = new Set(vcpus.map((vcpu) => processor(vcpu).currentThread));
      // Nothing is said about lists while a processor works on them.
      const inKernelCode = vcpus.some((vcpu) => {
        const { rip } = guest.machine.registers(vcpu);
        return rip >= guest.symbol('KiInsertTailList') && rip < guest.symbol('KiSystemCall64');
      });
      if (inKernelCode) continue;
      const ready = new Set<Gva>();
      const waiting = new Set<Gva>();
      for (const vcpu of vcpus) {
        const prcb = processor(vcpu).kpcr + offset('_KPCR', 'Prcb');
        for (const entry of list(prcb + offset('_KPRCB', 'DispatcherReadyListHead'))) ready.add(entry);
        for (const entry of list(prcb + offset('_KPRCB', 'WaitListHead'))) waiting.add(entry);
      }
      for (const thread of all()) {
        const entry = thread.gva + offset('_KTHREAD', 'WaitListEntry');
        seen.add(thread.state);
        expect(ready.delete(entry)).toBe(thread.state === State.ready);
        expect(waiting.delete(entry)).toBe(thread.state === State.waiting);
        expect(current.has(thread.gva)).toBe(thread.state === State.running);
        if (thread.state === State.waiting) expect(waitReasonOf(thread)).toBe(WaitReason.delayExecution);
      }
      expect([ready.size, waiting.size]).toEqual([0, 0]);
    }
    expect([...seen].sort()).toEqual([State.ready, State.running, State.waiting]);

    const [system, user] = [...processes(kernel)];
    expect(system).toMatchObject({ name: 'System', pid: 4n });
    expect(directoryTable(system!)).toBe(guest.loaded.directoryTable);
    expect(directoryTable(user!)).not.toBe(guest.loaded.directoryTable);
    expect(guest.readU64(guest.symbol('PsInitialSystemProcess'))).toBe(system!.gva);
    // Two workers a processor, the checker, the look-alikes; and the one in user mode.
    expect([...threads(kernel, system!)].length).toBe(2 * vcpuCount + 2);
    expect([...threads(kernel, user!)].length).toBe(1);
    const ids = all().map(({ tid }) => tid);
    expect(new Set(ids).size).toBe(ids.length);
  });

  it('of idle processors are in no process’s list, and each processor has its own', () => {
    const { guest, vcpus, processor, all } = bootedGuest({ vcpus: 4, seed: 73 });
    const listed = new Set(all().map(({ gva }) => gva));
    const idle = new Set(vcpus.map((vcpu) => processor(vcpu).idleThread));
    expect(idle.size).toBe(4);
    for (const thread of idle) expect(listed.has(thread)).toBe(false);
    expect(guest.report().processors.some(({ halts }) => halts > 0n)).toBe(true);
  });

  it('share no stack, with each other or with the processors', () => {
    const { vcpus, processor, all, kernel } = bootedGuest({ vcpus: 3, seed: 74 });
    const tops = [
      ...all().map(({ stackBase }) => stackBase),
      ...vcpus.flatMap((vcpu) => {
        const { dpcStack, isrStack, ist } = processor(vcpu);
        return [dpcStack, isrStack, ...ist];
      }),
    ].sort((a, b) => Number(a - b));
    expect(vcpus.map((vcpu) => processor(vcpu).ist.length)).toEqual([3, 3, 3]);
    for (const [index, top] of tops.entries()) {
      if (index > 0) expect(top - tops[index - 1]!).toBeGreaterThan(STACK_BYTES);
      // A guard page lies below, so that an overrun is a fault and no corruption.
      expect(kernel.memory.isMapped(top - 1n)).toBe(true);
      expect(kernel.memory.isMapped(top - STACK_BYTES)).toBe(true);
      expect(kernel.memory.isMapped(top - STACK_BYTES - 1n)).toBe(false);
    }
  });
});

describe('the stacks of a processor', () => {
  it('hold the clock’s service routine and the DPCs, which the clock can interrupt', () => {
    const { guest, processor } = bootedGuest({ vcpus: 1, seed: 75 });
    const on = (top: Gva, rsp: Gva) => rsp < top && rsp >= top - STACK_BYTES;
    const seen = new Map<string, Set<string>>();
    const routines = [
      ['isr', 'KeUpdateRunTime', 'KiDispatchInterrupt'],
      ['dpc', 'WlDpcRoutine', 'WlRunStream'],
    ] as const;
    let stack = 'thread';
    for (let step = 0; step < 12_000; step++) {
      const inDpc = stack === 'dpc' && step % 50 === 0;
      if (step % 400 === 0 || inDpc) guest.tick(0);
      guest.machine.step(0, 1);
      const { rip, rsp } = guest.machine.registers(0);
      const { dpcStack, isrStack } = processor(0);
      stack = on(dpcStack, rsp) ? 'dpc' : on(isrStack, rsp) ? 'isr' : 'thread';
      for (const [name, from, to] of routines) {
        if (rip >= guest.symbol(from) && rip < guest.symbol(to)) {
          seen.set(name, (seen.get(name) ?? new Set()).add(stack));
        }
      }
      if (stack === 'dpc' && rip === guest.symbol('KiClockInterrupt') + 1n) seen.set('nested', new Set());
    }
    expect([...seen.get('isr')!]).toEqual(['isr']);
    expect([...seen.get('dpc')!]).toEqual(['dpc']);
    expect(seen.has('nested')).toBe(true);
  });
});

describe('the user-mode thread', () => {
  it('runs, makes system calls, is interrupted, and finds no register changed', () => {
    const { guest } = bootedGuest({ vcpus: 2, seed: 76 });
    const before = guest.report();
    for (let round = 0; round < 400; round++) {
      guest.tick(1);
      guest.machine.step(1, 700 + round);
    }
    const after = guest.report();
    expect(after.systemCalls - before.systemCalls).toBeGreaterThan(10n);
    expect(after.userLoops).toBeGreaterThan(before.userLoops);
    expect(after.userErrors).toBe(0n);
  });

  it.each(['rbx', 'rdi', 'rsi', 'r12', 'r14'] as const)('would notice if the kernel changed %s', (name) => {
    const { guest } = bootedGuest({ vcpus: 1, seed: 77 });
    const service = guest.symbol('WlServiceTransform');
    for (let step = 0; guest.machine.registers(0).rip !== service; step++) {
      if (step % 3000 === 0) guest.tick(0);
      guest.machine.step(0, 1);
    }
    // What the service will return with: some of it lies in the trap frame, right above the return address.
    const { rsp, r12, r14 } = guest.machine.registers(0);
    if (name === 'r12') guest.machine.setRegisters(0, { r12: r12 + 1n });
    else if (name === 'r14') guest.machine.setRegisters(0, { r14: r14 + 1n });
    else {
      const field = guest.profile.offset('_KTRAP_FRAME', { rbx: 'Rbx', rdi: 'Rdi', rsi: 'Rsi' }[name]);
      guest.write(rsp + 8n + BigInt(field), Buffer.alloc(8, 0x77));
    }
    guest.until(({ userErrors }) => userErrors > 0n, 'an error of the user thread');
  });
});

describe('a stop', () => {
  function jumpTo(guest: SteppedGuest, vcpu: number, rip: Gva): void {
    guest.machine.step(vcpu, 3000); // past a tick that is due
    guest.machine.setRegisters(vcpu, { rip });
    guest.machine.step(vcpu, 5000);
  }

  it('is reported with vector, RIP, error code and CR2, and on the console', () => {
    const guest = SteppedGuest.boot({ vcpus: 2, seed: 78 });
    expect(guest.report().bugCheck).toBeUndefined();
    expect(guest.machine.takeConsole()).toContain('kernel up');
    const nowhere = 0xffff_ff00_0000_1230n;
    jumpTo(guest, 0, nowhere);
    expect(guest.report().bugCheck).toMatchObject({ vector: 14, rip: nowhere, cr2: nowhere });
    expect(guest.report().bugCheck!.errorCode & 0x10n).toBe(0x10n); // a fetch
    expect(guest.machine.takeConsole()).toContain('STOP');
    // The other processor goes on.
    const { ticks } = guest.report().processors[1]!;
    guest.round();
    guest.round();
    expect(guest.report().processors[1]!.ticks).toBeGreaterThan(ticks);
    expect(guest.report().processors[0]!.ticks).toBeGreaterThan(0n);
  });

  it('keeps the first reason when a second processor stops too', () => {
    const guest = SteppedGuest.boot({ vcpus: 2, seed: 79 });
    const [first, second] = [0xffff_ff00_0000_1000n, 0xffff_ff00_0000_2000n];
    jumpTo(guest, 0, first);
    jumpTo(guest, 1, second);
    const { rip } = guest.machine.registers(1);
    expect(rip >= guest.symbol('KiUnexpectedInterrupt') && rip < guest.symbol('WlPrintHex')).toBe(true);
    expect(guest.report().bugCheck).toMatchObject({ rip: first });
  });
});

import { describe, expect, it } from 'vitest';
import type { Kernel } from '../../src/nt/kernel.js';
import { processes } from '../../src/nt/processes.js';
import { findProcessor } from '../../src/nt/processors.js';
import { ThreadState, threads } from '../../src/nt/threads.js';
import { type ScanResult, scanGuest } from '../../src/safety/scan.js';
import type { Gva } from '../../src/vmi/address.js';
import { inUserMode, type Registers } from '../../src/x86/registers.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';

const INTERRUPT_FLAG = 1n << 9n;
const STACK_BYTES = 0x6000n;
/** Enough for an interrupt, a DPC and a context switch. */
const STEPS_AFTER_INTERRUPT = 400;
const SEARCH_STEPS = 60_000;

type Place = 'thread' | 'dpc' | 'user';

/** A booted guest that only runs as the test steps it. */
function steppedGuest(seed: number) {
  const guest = EmbeddedGuest.boot({ vcpus: 2, seed });
  guest.stopTimer();
  const kernel = guest.discover();
  const registers = (vcpu: number) => guest.machine.registers(vcpu);
  const processor = (vcpu: number) => findProcessor(kernel, vcpu, registers(vcpu))!;
  const onStack = (top: Gva, { rsp }: Registers) => rsp < top && rsp >= top - STACK_BYTES;
  const placeOf = (vcpu: number): Place => {
    const now = registers(vcpu);
    if (inUserMode(now)) return 'user';
    return onStack(processor(vcpu).dpcStack, now) ? 'dpc' : 'thread';
  };
  /** Steps until the vCPU can be interrupted at such a place, letting the clock tick on the way. */
  const reach = (vcpu: number, place: Place, stride: number): Registers => {
    for (let step = 0; step < SEARCH_STEPS; step++) {
      guest.machine.step(vcpu, stride);
      if (step % 40 === 0) guest.tick(vcpu);
      const now = registers(vcpu);
      if ((now.rflags & INTERRUPT_FLAG) !== 0n && placeOf(vcpu) === place) return now;
    }
    throw new Error(`the guest does not get to a ${place}`);
  };
  const scanFor = (value: Gva): ScanResult =>
    scanGuest(guest.hypervisor, kernel, [{ start: value, end: value + 1n, owner: 'here' }]);
  return { guest, kernel, registers, processor, onStack, reach, scanFor };
}

const everything = (kernel: Kernel) => [{ start: kernel.base, end: kernel.end, owner: 'kernel' }];

describe('the embedded guest', () => {
  it('shows its processes and threads', () => {
    const { guest, kernel, processor } = steppedGuest(3);
    expect(kernel.base).toBe(guest.loaded.kernelBase);
    expect(kernel.memory.pageTable).toBe(guest.loaded.directoryTable);
    const all = [...processes(kernel)];
    expect(all[0]).toMatchObject({ name: 'System', pid: 4n });
    expect(all.length).toBeGreaterThan(1);
    const listed = new Set(all.flatMap((process) => [...threads(kernel, process)].map(({ gva }) => gva)));
    for (const vcpu of [0, 1]) {
      const { currentThread, idleThread } = processor(vcpu);
      expect(listed.has(currentThread) || currentThread === idleThread).toBe(true);
    }
  });

  it('is blocked by what every thread will return to', () => {
    const { guest, kernel } = steppedGuest(4);
    const result = scanGuest(guest.hypervisor, kernel, everything(kernel));
    expect(result.verdict).toBe('blocked');
    const found = new Set(result.findings.map(({ thread }) => thread?.gva));
    for (const process of processes(kernel)) {
      for (const { gva, state } of threads(kernel, process)) {
        if (state !== ThreadState.Running) expect(found.has(gva)).toBe(true);
      }
    }
  });

  it('is safe for a range that nothing leads to', () => {
    const { reach, scanFor, kernel } = steppedGuest(5);
    reach(0, 'thread', 7);
    expect(scanFor(kernel.base)).toMatchObject({ verdict: 'safe', unsettled: [] });
  });

  it.each([
    ['thread', 11],
    ['thread', 12],
    ['thread', 13],
    ['dpc', 14],
    ['dpc', 15],
  ] as const)(
    'is never safe between the interruption of an instruction on a %s stack and its return, seed %s',
    (place, seed) => {
      const { guest, registers, processor, onStack, reach, scanFor } = steppedGuest(seed);
      const vcpu = seed % 2;
      const interrupted = reach(vcpu, place, 1 + (seed % 5));
      const { currentThread } = processor(vcpu);
      guest.tick(vcpu);
      const seen = { isr: 0, unsettled: 0, switched: 0 };
      for (let step = 0; step < STEPS_AFTER_INTERRUPT; step++) {
        guest.machine.step(vcpu, 1);
        const now = registers(vcpu);
        const isBack = now.rsp === interrupted.rsp && processor(vcpu).currentThread === currentThread;
        if (isBack && now.rip !== interrupted.rip) break;
        const { verdict } = scanFor(interrupted.rip);
        expect(verdict, `${step} instructions after the interrupt`).not.toBe('safe');
        if (verdict === 'unsettled') seen.unsettled++;
        if (onStack(processor(vcpu).isrStack, now)) seen.isr++;
        if (processor(vcpu).currentThread !== currentThread) seen.switched++;
      }
      expect(seen.isr).toBeGreaterThan(0);
      if (place === 'thread') {
        expect(seen.switched).toBeGreaterThan(0);
        expect(seen.unsettled).toBeGreaterThan(0);
      }
    },
  );

  it('has nothing alive on the kernel stack of a thread in user mode', () => {
    const { reach, registers, scanFor, kernel } = steppedGuest(21);
    const vcpu = [0, 1].find((each) => {
      try {
        reach(each, 'user', 50);
        return true;
      } catch {
        return false;
      }
    });
    expect(vcpu).toBeDefined();
    expect(inUserMode(registers(vcpu!))).toBe(true);
    expect(scanFor(kernel.base)).toMatchObject({ verdict: 'safe' });
  });
});

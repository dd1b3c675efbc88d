import { describe, expect, it } from 'vitest';
import { discoverKernel, type Kernel } from '../../src/nt/kernel.js';
import { processes } from '../../src/nt/processes.js';
import { findProcessor } from '../../src/nt/processors.js';
import { readThread, type Thread, ThreadState, threads } from '../../src/nt/threads.js';
import { nextRandom } from '../../src/random.js';
import { type ScanResult, scanGuest } from '../../src/safety/scan.js';
import type { Gva } from '../../src/vmi/address.js';
import { whileQuiescent } from '../../src/vmi/quiescence.js';
import { inUserMode, type Registers } from '../../src/x86/registers.js';
import { SteppedGuest } from '../guest/stepped-guest.js';

const INTERRUPT_FLAG = 1n << 9n;
const STACK_BYTES = 0x6000n;
/** The processor aligns RSP, then pushes SS, RSP, RFLAGS, CS and RIP. */
const machineFrame = (rsp: Gva) => (rsp & ~15n) - 40n;
/** An interrupt, a DPC and a context switch take fewer instructions. */
const STEPS_AFTER_INTERRUPT = 600;
const INSTRUCTIONS_TO_START = 200_000;
const STEPS_BETWEEN_TICKS = 1000;
const RANDOM_STEPS = 25_000;
const SEARCH_STEPS = 200_000;

type Place = 'thread' | 'idle' | 'dpc' | 'user';

/** A booted guest that only runs as the test steps it; `asleep`: its threads still wait for the first tick. */
function steppedGuest(seed: number, asleep = false) {
  const guest = asleep ? new SteppedGuest({ seed }) : SteppedGuest.boot({ seed });
  if (asleep) for (const vcpu of [0, 1]) guest.machine.step(vcpu, INSTRUCTIONS_TO_START);
  const kernel = whileQuiescent(guest.hypervisor, () => discoverKernel(guest.hypervisor, guest.profile));
  const registers = (vcpu: number) => guest.machine.registers(vcpu);
  const processor = (vcpu: number) => findProcessor(kernel, vcpu, registers(vcpu))!;
  const onStack = (top: Gva, { rsp }: Registers) => rsp < top && rsp >= top - STACK_BYTES;
  const placeOf = (vcpu: number): Place => {
    const now = registers(vcpu);
    if (inUserMode(now)) return 'user';
    const { dpcStack, currentThread, idleThread } = processor(vcpu);
    if (onStack(dpcStack, now)) return 'dpc';
    return currentThread === idleThread ? 'idle' : 'thread';
  };
  /** Steps until the condition holds, letting the clock tick on the way. */
  const stepUntil = (vcpu: number, stride: number, condition: (now: Registers) => boolean): Registers => {
    let sinceTick = 0;
    for (let step = 0; step < SEARCH_STEPS; step += stride, sinceTick += stride) {
      if (sinceTick >= STEPS_BETWEEN_TICKS) {
        guest.tick(vcpu);
        sinceTick = 0;
      }
      guest.machine.step(vcpu, stride);
      if (condition(registers(vcpu))) return registers(vcpu);
    }
    throw new Error('the guest does not get there');
  };
  /** Steps until the vCPU can be interrupted at such a place. */
  const reach = (vcpu: number, place: Place, stride: number): Registers => {
    const isThere = ({ rflags }: Registers) => (rflags & INTERRUPT_FLAG) !== 0n && placeOf(vcpu) === place;
    return stepUntil(vcpu, stride, (now) => {
      if (!isThere(now)) return false;
      // Behind STI one more instruction runs before an interrupt can be taken.
      guest.machine.step(vcpu, 1);
      return isThere(registers(vcpu));
    });
  };
  /** Steps the vCPU out of a context switch, in which nothing can be said about it. */
  const settle = (vcpu: number) => reach(vcpu, 'thread', 1);
  const scan = (start: Gva, end = start + 1n): ScanResult =>
    scanGuest(guest.hypervisor, kernel, [{ start, end, owner: 'here' }]);
  return { guest, kernel, registers, processor, onStack, stepUntil, reach, settle, scan };
}

function threadNamed(kernel: Kernel, processName: string): Thread {
  for (const process of processes(kernel)) {
    if (process.name === processName) return [...threads(kernel, process)][0]!;
  }
  throw new Error(`there is no process ${processName}`);
}

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
    const { kernel, scan } = steppedGuest(4);
    const result = scan(kernel.base, kernel.end);
    expect(result.verdict).toBe('blocked');
    const found = new Set(result.findings.map(({ thread }) => thread?.gva));
    for (const process of processes(kernel)) {
      for (const { gva, state } of threads(kernel, process)) {
        if (state !== ThreadState.Running) expect(found.has(gva)).toBe(true);
      }
    }
  });

  it('is safe for a range that nothing leads to', () => {
    const { guest, settle, scan } = steppedGuest(5);
    settle(0);
    settle(1);
    // Amid a quadword of the kernel's own data: nobody has a pointer to it.
    const nowhere = guest.symbol('KiInterruptTable') + 3n;
    expect(scan(nowhere)).toMatchObject({ verdict: 'safe', unsettled: [], findings: [] });
  });

  it.each([
    ['thread', 11],
    ['thread', 13],
    ['thread', 17],
    ['idle', 30],
    ['dpc', 14],
    ['dpc', 15],
    ['dpc', 16],
  ] as const)(
    'is never safe between the interruption of an instruction on a %s stack and its return, seed %s',
    (place, seed) => {
      const { guest, registers, processor, onStack, reach, scan } = steppedGuest(seed, place === 'idle');
      // Odd seeds take the processor on which the integrity checker, whose quantum is longer, does not run.
      const vcpu = seed % 2;
      const interrupted = reach(vcpu, place, 1 + (seed % 5));
      const { currentThread } = processor(vcpu);
      guest.tick(vcpu);
      const seen = { isr: 0, unsettled: 0, switched: 0, back: false };
      for (let step = 0; step < STEPS_AFTER_INTERRUPT && !seen.back; step++) {
        guest.machine.step(vcpu, 1);
        const now = registers(vcpu);
        if (step === 0) expect(guest.readU64(machineFrame(interrupted.rsp))).toBe(interrupted.rip);
        const { verdict } = scan(interrupted.rip);
        expect(verdict, `${step} instructions after the interrupt`).not.toBe('safe');
        if (verdict === 'unsettled') seen.unsettled++;
        if (onStack(processor(vcpu).isrStack, now)) seen.isr++;
        if (processor(vcpu).currentThread !== currentThread) seen.switched++;
        seen.back = now.rsp === interrupted.rsp && now.rip === interrupted.rip;
      }
      expect(seen.isr).toBeGreaterThan(0);
      if (place === 'thread') {
        expect(seen.switched).toBeGreaterThan(0);
        expect(seen.unsettled).toBeGreaterThan(0);
      } else {
        expect(seen.back).toBe(true);
      }
    },
  );

  it('is never safe while any frame leads into a function, and safe most of the time that none does', () => {
    const { guest, registers, scan } = steppedGuest(40);
    const start = guest.symbol('NtQuerySystemInformation');
    const end = guest.symbol('NtSetSystemInformation');
    const inside = (rip: Gva) => rip >= start && rip < end;
    const clock = guest.symbol('KiClockInterrupt');
    const frames = new Set<Gva>();
    const seen = { live: 0, safe: 0, spurious: 0 };
    let random = 40;
    for (let step = 0; step < RANDOM_STEPS; step++) {
      random = nextRandom(random);
      const vcpu = random & 1;
      // Ticks come often while a vCPU is inside, so that it is interrupted there.
      if (random % (inside(registers(vcpu).rip) ? 13 : 1009) === 0) guest.tick(vcpu);
      const before = registers(vcpu);
      guest.machine.step(vcpu, 1);
      const { rip } = registers(vcpu);
      // An interrupt is taken before the step's instruction, which is then the handler's first.
      if (inside(before.rip) && rip > clock && rip < clock + 8n) frames.add(machineFrame(before.rsp));
      else if (frames.has(before.rsp) && rip === guest.readU64(before.rsp)) frames.delete(before.rsp);
      const live = frames.size > 0 || [0, 1].some((each) => inside(registers(each).rip));
      if (step % 8 !== 0) continue;
      const { verdict } = scan(start, end);
      if (live) {
        seen.live++;
        expect(verdict, `step ${step}`).not.toBe('safe');
      } else if (verdict === 'safe') seen.safe++;
      else if (verdict === 'blocked') seen.spurious++;
    }
    expect(seen.live).toBeGreaterThan(100);
    expect(seen.safe).toBeGreaterThan(100);
    // A register that was saved with a pointer to the function, such as the one it was called through.
    expect(seen.spurious).toBeLessThan(seen.safe / 4);
  });

  it('has nothing alive on the kernel stack of a thread in user mode, and much while it is in a service', () => {
    const { guest, kernel, registers, stepUntil, scan } = steppedGuest(21);
    const vcpu = 1; // the user thread's processor is the last one
    const services = [guest.symbol('KiSystemCall64'), guest.symbol('KiTrapStubs')] as const;
    const service = guest.symbol('WlServiceTransform');
    stepUntil(vcpu, 1, ({ rip }) => rip === service);
    expect(scan(...services)).toMatchObject({ verdict: 'blocked', findings: [{ kind: 'thread-stack' }] });

    while (!inUserMode(registers(vcpu))) guest.machine.step(vcpu, 1);
    const { stackBase, stackLimit } = threadNamed(kernel, 'smss.exe');
    const stack = guest.read(stackLimit, Number(stackBase - stackLimit));
    const dead = Array.from({ length: stack.length / 8 }, (_, index) => stack.readBigUInt64LE(index * 8));
    expect(dead.some((value) => value >= services[0] && value < services[1])).toBe(true);
    expect(scan(...services)).toMatchObject({ verdict: 'safe' });
  });

  it('finds what an interrupt with a stack of its own has interrupted', () => {
    const { guest, kernel, registers, processor, onStack, reach, scan } = steppedGuest(22);
    const { rip } = reach(0, 'thread', 3);
    // Without a stack the clock interrupt cannot be delivered, nor the page fault that says so.
    const { stackLimit } = readThread(kernel, processor(0).currentThread);
    guest.machine.setRegisters(0, { rsp: stackLimit - 8n });
    guest.tick(0);
    guest.machine.step(0, 1);
    expect(onStack(processor(0).ist[0]!, registers(0))).toBe(true);
    const { verdict, findings } = scan(rip);
    expect(verdict).toBe('blocked');
    expect(findings).toContainEqual(expect.objectContaining({ kind: 'ist-stack', value: rip, vcpu: 0 }));
  });
});

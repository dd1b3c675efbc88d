import { describe, expect, it } from 'vitest';
import { discoverKernel, type Kernel } from '../../src/nt/kernel.js';
import { type Profile, parseProfile } from '../../src/nt/profile.js';
import { machineFrameBelow } from '../../src/safety/machine-frame.js';
import { type Finding, type LiveRange, scanGuest } from '../../src/safety/scan.js';
import { TrapFrame } from '../../src/safety/trap-frame.js';
import { type Gva, PAGE_SIZE } from '../../src/vmi/address.js';
import { whileQuiescent } from '../../src/vmi/quiescence.js';
import { inUserMode, type Registers } from '../../src/x86/registers.js';
import { SteppedGuest } from '../guest/stepped-guest.js';
import { FakeGuest, type FakeThread, profile, profileText } from '../kernel/fake-guest.js';

/** The offset of RIP in a KTRAP_FRAME. */
const RIP = 0x168n;
const INSIDE = 0xffff_f804_1a21_5f11n;
const ELSEWHERE = 0xffff_f804_1a21_4000n;
/** 16-byte aligned, and far from the ends of its stack. */
const RSP_DEPTH = 0x200n;

interface Frame {
  readonly rsp: Gva;
  readonly where?: Gva;
  readonly mxcsr?: bigint;
  readonly ss?: bigint;
}

/** A trap frame as NT leaves it of code that was interrupted at `INSIDE`. */
function writeFrame(
  guest: FakeGuest,
  { rsp, where = machineFrameBelow(rsp), mxcsr = 0x1f80n, ss = 0x18n }: Frame,
) {
  const start = where - RIP;
  const fields = { Rax: 1n, Rcx: 2n, Rdx: 3n, R8: 8n, R9: 9n, R10: 10n, R11: 11n, Rbp: 5n, Rip: INSIDE };
  for (const [field, value] of Object.entries(fields)) guest.set(start, '_KTRAP_FRAME', field, value);
  // The four bytes in front of RAX.
  guest.write64(start + 0x28n, mxcsr << 32n);
  guest.set(start, '_KTRAP_FRAME', 'SegCs', 0x10n);
  guest.set(start, '_KTRAP_FRAME', 'EFlags', 0x246n);
  guest.set(start, '_KTRAP_FRAME', 'Rsp', rsp);
  guest.set(start, '_KTRAP_FRAME', 'SegSs', ss);
  return where;
}

function setUp(options: { depth?: bigint; used?: Profile } = {}) {
  const { depth = 0x1000n, used = profile } = options;
  const guest = new FakeGuest();
  const kernel = discoverKernel(guest, used);
  const thread = guest.addThread(guest.addProcess('work.exe', 8n), { depth });
  const ranges: LiveRange[] = [{ start: INSIDE, end: INSIDE + 1n, owner: 'a handler' }];
  const findings = () => scanGuest(guest, kernel, ranges).findings;
  const at = (where: Gva): Finding => {
    const found = findings().find((finding) => finding.where === where);
    if (found === undefined) throw new Error('the scan has not found it');
    return found;
  };
  const stack = () => guest.readPhysical(guest.translate(guest.kernelRoot, thread.limit)!, 0x6000);
  return { guest, kernel, thread, at, stack };
}

const rspOf = ({ base }: FakeThread) => base - RSP_DEPTH;

describe('a trap frame', () => {
  it('tells with what its thread goes on, and has it go on otherwise', () => {
    const { guest, kernel, thread, at } = setUp();
    const where = writeFrame(guest, { rsp: rspOf(thread) });
    const frame = TrapFrame.of(kernel, at(where))!;
    expect(frame.registers).toEqual({
      ...{ rip: INSIDE, rsp: rspOf(thread), rax: 1n, rcx: 2n, rdx: 3n, rbp: 5n },
      ...{ r8: 8n, r9: 9n, r10: 10n, r11: 11n },
    });
    expect(frame.change(guest, { rip: ELSEWHERE, rax: 7n, r11: 12n })).toBe(true);
    const after = ['Rip', 'Rax', 'Rcx', 'R10', 'R11', 'Rbp', 'Rsp'].map((field) =>
      guest.read64(where - RIP + guest.offset('_KTRAP_FRAME', field)),
    );
    expect(after).toEqual([ELSEWHERE, 7n, 2n, 10n, 12n, 5n, rspOf(thread)]);
  });

  it('is changed by one write: nobody may end between two', () => {
    const { guest, kernel, thread, at } = setUp();
    const frame = TrapFrame.of(kernel, at(writeFrame(guest, { rsp: rspOf(thread) })))!;
    const writes: number[] = [];
    const hypervisor = Object.assign(Object.create(guest) as FakeGuest, {
      writePhysical: (_: bigint, bytes: Uint8Array) => writes.push(bytes.length),
    });
    frame.change(hypervisor, { rip: ELSEWHERE, rcx: 7n });
    expect(writes).toEqual([0x168 - 0x38 + 8]);
  });

  it.each([
    ['RIP lies on the next page', 0x140n, { rax: 7n }, false],
    ['what changes lies on one page', 0x140n, {}, true],
    ['the register lies on the page before, RIP on the next', 0x40n, { rcx: 7n }, false],
    ['the register lies behind the edge', 0x40n, { rdx: 7n }, true],
  ] as const)('that crosses a page is changed only if that is one write: %s', (_, intoFrame, changes, is) => {
    const { guest, kernel, thread, at, stack } = setUp({ depth: 0x3000n });
    const edge = thread.base - BigInt(PAGE_SIZE);
    const where = edge - intoFrame + RIP;
    writeFrame(guest, { rsp: where + 40n });
    const frame = TrapFrame.of(kernel, at(where))!;
    expect(frame.registers.rax).toBe(1n);
    const before = stack();
    expect(frame.change(guest, { rip: ELSEWHERE, ...changes })).toBe(is);
    expect(stack().equals(before)).toBe(!is);
  });

  it('has no register but those that NT saves for every interrupt', () => {
    const { guest, kernel, thread, at, stack } = setUp();
    const frame = TrapFrame.of(kernel, at(writeFrame(guest, { rsp: rspOf(thread) })))!;
    const before = stack();
    expect(frame.change(guest, { rip: ELSEWHERE, rbx: 7n })).toBe(false);
    expect(frame.change(guest, { rip: ELSEWHERE, rsp: 7n })).toBe(false);
    expect(stack().equals(before)).toBe(true);
  });
});

describe('where a processor cannot have pushed a frame, there is none', () => {
  it.each([
    [
      'further below the RSP that it interrupted',
      (rsp: Gva) => ({ rsp, where: machineFrameBelow(rsp) - 16n }),
    ],
    ['above it', (rsp: Gva) => ({ rsp, where: machineFrameBelow(rsp) + 16n })],
    ['on another stack than RSP', (rsp: Gva) => ({ rsp: rsp + 0x10_0000n, where: machineFrameBelow(rsp) })],
    ['unaligned', (rsp: Gva) => ({ rsp, where: machineFrameBelow(rsp) + 8n })],
    ['with a stack segment of a user', (rsp: Gva) => ({ rsp, ss: 0x2bn })],
  ])('%s', (_, frameAt) => {
    const { guest, kernel, thread, at } = setUp();
    const where = writeFrame(guest, frameAt(rspOf(thread)));
    expect(at(where).isRip).toBe(true);
    expect(TrapFrame.of(kernel, at(where))).toBeUndefined();
  });

  it.each([8n, 16n, 24n, 32n])('with its upper %i bytes beyond the end of the stack', (missing) => {
    const { guest, kernel, thread, at } = setUp();
    const where = thread.base - 40n + missing;
    guest.write64(where, INSIDE);
    expect(TrapFrame.of(kernel, at(where))).toBeUndefined();
  });

  it('around a value that is no RIP', () => {
    const { guest, kernel, thread, at } = setUp();
    guest.write64(rspOf(thread), INSIDE);
    expect(TrapFrame.of(kernel, at(rspOf(thread)))).toBeUndefined();
  });

  it('for the RIP of a vCPU', () => {
    const { guest, kernel } = setUp();
    guest.vcpus[0]!.rip = INSIDE;
    const { findings } = scanGuest(guest, kernel, [{ start: INSIDE, end: INSIDE + 1n, owner: 'x' }]);
    expect(findings.map((finding) => TrapFrame.of(kernel, finding))).toEqual([undefined]);
  });
});

describe('nothing but RIP is changed', () => {
  const expectRipOnly = (kernel: Kernel, guest: FakeGuest, finding: Finding) => {
    const frame = TrapFrame.of(kernel, finding)!;
    expect(Object.keys(frame.registers).sort()).toEqual(['rip', 'rsp']);
    expect(frame.change(guest, { rip: ELSEWHERE, rax: 7n })).toBe(false);
    expect(guest.read64(finding.where!)).toBe(INSIDE);
    expect(frame.change(guest, { rip: ELSEWHERE })).toBe(true);
    expect(guest.read64(finding.where!)).toBe(ELSEWHERE);
  };

  it.each([
    ['all zeros', 0n],
    ['no register of a kernel: exceptions unmasked', 0x1f00n],
    ['an address', 0xffff_f804n],
  ])('where MXCSR should be there is something else: %s', (_, mxcsr) => {
    const { guest, kernel, thread, at } = setUp();
    expectRipOnly(kernel, guest, at(writeFrame(guest, { rsp: rspOf(thread), mxcsr })));
  });

  it.each([0n, 8n, 0x100n, RIP])('the stack pointer is at the frame, or in it: %i bytes', (above) => {
    const { guest, kernel, thread, at } = setUp({ depth: RSP_DEPTH + 0x190n - above });
    expectRipOnly(kernel, guest, at(writeFrame(guest, { rsp: rspOf(thread) })));
  });

  it('a vCPU has its RSP at the frame: it saves registers, or gives them back', () => {
    const { guest, kernel, thread, at } = setUp();
    guest.run(0, thread, RSP_DEPTH + 0x190n);
    expectRipOnly(kernel, guest, at(writeFrame(guest, { rsp: rspOf(thread) })));
  });

  it('an NMI has interrupted whoever may save them', () => {
    const { guest, kernel, thread, at } = setUp();
    guest.run(0, thread);
    const nmi = guest.allocate(0x2000) + 0x2000n;
    guest.setIst(0, 2, nmi);
    guest.vcpus[0]!.rsp = nmi - 0x300n;
    expectRipOnly(kernel, guest, at(writeFrame(guest, { rsp: rspOf(thread) })));
  });

  it('an interrupt with a stack of its own has saved them somehow', () => {
    const { guest, kernel, thread, at } = setUp();
    guest.run(0, thread);
    const nmi = guest.allocate(0x2000) + 0x2000n;
    guest.setIst(0, 2, nmi);
    guest.vcpus[0]!.rsp = nmi - 0x300n;
    const where = writeFrame(guest, { rsp: rspOf(thread), where: machineFrameBelow(nmi) });
    expectRipOnly(kernel, guest, at(where));
  });

  it('the profile does not say where they are', () => {
    const used = parseProfile(
      profileText(({ user_types }) => {
        delete user_types._KTRAP_FRAME;
      }),
      'x',
    );
    const { guest, kernel, thread, at } = setUp({ used });
    expectRipOnly(kernel, guest, at(writeFrame(guest, { rsp: rspOf(thread) })));
  });
});

describe('a value like its RIP', () => {
  it.each([
    ['a CONTEXT below', -0x300n, -0x60n, true],
    ['a CONTEXT above', 0x100n, -0x60n, true],
    ['a machine frame', -0x300n, 24n, true],
    ['the register of a thread', -0x300n, undefined, false],
    ['a value right behind the frame, which has RSP itself', 40n, undefined, false],
    ['a value right in front of the frame', -RIP - 8n, undefined, false],
    ['a value with RSP far away', -0x400n, 0x200n, false],
  ] as const)('may belong to a copy if RSP is near: %s', (_, from, rspFrom, may) => {
    const { guest, kernel, thread, at } = setUp({ depth: 0x800n });
    const rsp = thread.base - 0x300n;
    const where = writeFrame(guest, { rsp });
    guest.write64(where + from, INSIDE);
    if (rspFrom !== undefined) guest.write64(where + from + rspFrom, rsp);
    expect(TrapFrame.of(kernel, at(where))!.mayBeCopiedAt(at(where + from))).toBe(may);
  });
});

const INTERRUPT_FLAG = 1n << 9n;
const MOST_STEPS = 200_000;
const STEPS_BETWEEN_TICKS = 1000;
/** An interrupt and, now and then, a DPC and a context switch. */
const MOST_INSTRUCTIONS = 200;
const CHANGED = 0x1234_5678_9abc_def0n;

/** Steps the vCPU until it can be interrupted in kernel mode, and behind STI one instruction more. */
function stepToInterruptible(guest: SteppedGuest): Registers {
  for (let ready = 0; ; guest.machine.step(0, 1)) {
    const registers = guest.machine.registers(0);
    ready = (registers.rflags & INTERRUPT_FLAG) !== 0n && !inUserMode(registers) ? ready + 1 : 0;
    if (ready > 1) return registers;
  }
}

/** Steps the vCPU until the interrupted code goes on at `rip`. */
function stepBack(guest: SteppedGuest, rip: Gva, rsp: Gva): Registers {
  for (let step = 1; step < MOST_STEPS; step++) {
    const registers = guest.machine.registers(0);
    if (registers.rip === rip && registers.rsp === rsp) return registers;
    if (step % STEPS_BETWEEN_TICKS === 0) guest.tick(0);
    guest.machine.step(0, 1);
  }
  throw new Error('the interrupted code does not go on there');
}

describe('the trap frame of an interrupt that is being handled', () => {
  it('is what the code was stopped with and goes on with, after whatever instruction of the kernel it is changed', () => {
    const guest = SteppedGuest.boot({ vcpus: 1, seed: 71 });
    const kernel = whileQuiescent(guest.hypervisor, () => discoverKernel(guest.hypervisor, guest.profile));
    // Never executed.
    const elsewhere = guest.symbol('KiTrapStubs');
    const seen = { whole: 0, ripOnly: 0, back: 0 };
    for (let instructions = 1; instructions < MOST_INSTRUCTIONS; instructions++) {
      const before = stepToInterruptible(guest);
      const where = machineFrameBelow(before.rsp);
      guest.tick(0);
      guest.machine.step(0, instructions);
      const frame = whileQuiescent(guest.hypervisor, () => {
        const here = { start: before.rip, end: before.rip + 1n, owner: 'here' };
        const { findings } = scanGuest(guest.hypervisor, kernel, [here]);
        const found = findings.find((finding) => finding.where === where);
        if (found === undefined) return undefined;
        const frame = TrapFrame.of(kernel, found)!;
        const isWhole = frame.registers.rax !== undefined;
        frame.change(guest.hypervisor, { rip: elsewhere, ...(isWhole ? { rax: CHANGED } : {}) });
        return frame;
      });
      if (frame === undefined) {
        seen.back++;
        continue;
      }
      for (const [name, value] of Object.entries(frame.registers)) {
        expect(value, `${name}, ${instructions} instructions`).toBe(before[name as keyof Registers]);
      }
      const isWhole = frame.registers.rax !== undefined;
      seen[isWhole ? 'whole' : 'ripOnly']++;
      const after = stepBack(guest, elsewhere, before.rsp);
      expect(after.rax, `${instructions} instructions`).toBe(isWhole ? CHANGED : before.rax);
      guest.machine.setRegisters(0, { rip: before.rip, rax: before.rax });
    }
    expect(seen.whole).toBeGreaterThan(60);
    expect(seen.ripOnly).toBeGreaterThan(30);
    expect(seen.back).toBeGreaterThan(0);
  });
});

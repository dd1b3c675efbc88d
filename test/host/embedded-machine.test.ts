import { afterEach, describe, expect, it } from 'vitest';
import { EventAction, EventId, PageAccess } from '../../src/host/kvmi-wire.js';
import type { Machine } from '../../src/machine/machine.js';
import { Fixture } from './fixture.js';
import type { Introspector } from './introspector.js';
import { CODE, DATA, SECRET, tinyGuest } from './tiny-guest.js';

// loop: mov eax, [rbx]; inc ecx; jmp loop
const READ_LOOP = '8b03ffc1ebfa';
const LOAD_END = CODE + 2n;

let fixture: Fixture<Machine> | undefined;
afterEach(() => fixture?.close());

async function attach(code: string, vcpus = 1, trapped = [DATA]) {
  fixture = await Fixture.attached(undefined, tinyGuest(code, vcpus));
  for (const frame of trapped) await fixture.trap(frame, PageAccess.EXECUTE);
  fixture.start();
  return { tool: fixture.tool, machine: fixture.machine };
}

/** Waits until a vCPU has counted on. */
async function ran(tool: Introspector, vcpu = 0): Promise<void> {
  const { rcx } = (await tool.registers(vcpu)).regs;
  while ((await tool.registers(vcpu)).regs.rcx <= rcx + 1n);
}

describe('the server over the embedded machine', () => {
  it('a read is answered with the tool’s bytes, and the next instruction has them', async () => {
    const { tool } = await attach(READ_LOOP);
    const event = await tool.event();
    expect(event.pageFault).toMatchObject({ gva: DATA, gpa: DATA, access: PageAccess.READ });
    expect(event.common.regs.rip).toBe(CODE);
    tool.answer(event, { data: Buffer.from('deadbeef'.repeat(4), 'hex') });
    const next = await tool.event();
    expect(next.common.regs).toMatchObject({ rax: 0xefbeadden, rcx: 1n });
    tool.answer(next);
    expect((await tool.event()).common.regs).toMatchObject({ rax: BigInt(SECRET.readUInt32LE()), rcx: 2n });
  });

  it('an instruction whose bytes were replaced while it was trapped is completed as it was decoded', async () => {
    const { tool } = await attach(READ_LOOP);
    const event = await tool.event();
    // mov al, 7 instead: shorter by nothing, but another instruction
    await tool.write(CODE, Buffer.from('b007', 'hex'));
    await tool.pauseAll(1);
    tool.answer(event);
    const paused = await tool.event();
    expect(paused.event).toBe(EventId.PAUSE_VCPU);
    expect(paused.common.regs).toMatchObject({ rip: LOAD_END, rax: BigInt(SECRET.readUInt32LE()), rcx: 0n });
    tool.answer(paused);
    await ran(tool);
    expect((await tool.registers(0)).regs.rax & 0xffn).toBe(7n);
  });

  it('a crossing read is two events, and a pause between them waits for the second', async () => {
    // mov rax, [rbx-4]: four bytes before the frame, four in it
    const { tool } = await attach('488b43fcebfa', 1, [DATA - 0x1000n, DATA]);
    const first = await tool.event();
    expect(first.pageFault).toMatchObject({ gva: DATA - 4n, access: PageAccess.READ });
    await tool.pauseAll(1);
    tool.answer(first, { data: Buffer.from('01020304', 'hex') });
    const second = await tool.event();
    expect(second.pageFault).toMatchObject({ gva: DATA, access: PageAccess.READ });
    tool.answer(second, { data: Buffer.from('05060708', 'hex') });
    const paused = await tool.event();
    expect(paused).toMatchObject({ event: EventId.PAUSE_VCPU });
    expect(paused.common.regs.rax).toBe(0x0807060504030201n);
  });

  it('a second piece on a page that was released meanwhile raises no event: nobody would answer it', async () => {
    const [before, after] = [DATA - 0x1000n, DATA];
    fixture = await Fixture.attached(undefined, tinyGuest('488b43fcebfa', 1));
    const { tool } = fixture;
    for (const frame of [before, after]) await fixture.trap(frame, PageAccess.EXECUTE);
    fixture.turn();
    tool.answer(await tool.event(), { data: Buffer.from('01020304', 'hex') });
    await tool.setAccess({ gpa: after, access: PageAccess.ALL });
    fixture.turn();
    fixture.turn();
    const next = await tool.event();
    expect(next.pageFault).toMatchObject({ gva: DATA - 4n });
    const released = SECRET.subarray(0, 4).toString('hex');
    expect(next.common.regs.rax).toBe(Buffer.from(`01020304${released}`, 'hex').readBigUInt64LE());
  });

  it('registers set while paused are there when the vCPU runs on', async () => {
    const { tool } = await attach(READ_LOOP);
    const fault = await tool.event();
    await tool.pauseAll(1);
    tool.answer(fault);
    const paused = await tool.event();
    await tool.setRegisters(0, { ...paused.common.regs, rcx: 1000n });
    tool.answer(paused);
    expect((await tool.event()).common.regs.rcx).toBe(1001n);
  });

  it('RETRY fetches the instruction again', async () => {
    const { tool } = await attach(READ_LOOP);
    const event = await tool.event();
    // mov al, 9
    await tool.write(CODE, Buffer.from('b009', 'hex'));
    tool.answer(event, { action: EventAction.RETRY });
    await ran(tool);
    expect((await tool.registers(0)).regs.rax).toBe(9n);
    expect(tool.pendingEvents).toBe(0);
  });

  it('single steps one instruction at a time', async () => {
    const { tool } = await attach('ffc1ffc1ebfa');
    await tool.pauseAll(1);
    const paused = await tool.event();
    await tool.enable(0, EventId.SINGLESTEP);
    await tool.singleStep(0, true);
    tool.answer(paused);
    let { rip } = paused.common.regs;
    for (let i = 0; i < 6; i++) {
      const step = await tool.event();
      expect(step.event).toBe(EventId.SINGLESTEP);
      expect(step.common.regs.rip).toBe(rip === CODE + 4n ? CODE : rip + 2n);
      rip = step.common.regs.rip;
      tool.answer(step);
    }
  });

  it('when the tool hangs up in the middle of an event the guest runs on, unhindered', async () => {
    const { tool, machine } = await attach(READ_LOOP, 2);
    await tool.event();
    await tool.event();
    const again = tool.accept();
    tool.hangUp();
    await again;
    expect(machine.access(DATA >> 12n)).toBe(PageAccess.ALL);
    await ran(tool, 0);
    await ran(tool, 1);
  });
});

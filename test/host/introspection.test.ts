import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  controlCmdResponse,
  EventAction,
  EventId,
  KvmError,
  kvmRegs,
  MAX_BODY,
  MessageId,
  messageHeader,
  PageAccess,
  pageAccessEntry,
  pauseVcpu,
  readPhysical,
  setPageAccess,
  vcpuHeader,
  writePhysical,
} from '../../src/host/kvmi-wire.js';
import { load, MEMORY_PAGES, nop, readOf } from './fake-machine.js';
import { Fixture } from './fixture.js';
import type { Introspector } from './introspector.js';

const TRAPPED = 0x3000n;
const EXECUTE_ONLY = PageAccess.EXECUTE;

let fixture: Fixture;
let tool: Introspector;

beforeEach(async () => {
  fixture = await Fixture.attached();
  tool = fixture.tool;
});
afterEach(() => fixture.close());

describe('attach', () => {
  it('answers what libvmi asks at attach', async () => {
    expect((await tool.command(MessageId.GET_VERSION)).data.readUInt32LE()).toBe(1);
    expect((await tool.command(MessageId.GET_GUEST_INFO)).data.readUInt32LE()).toBe(2);
    for (const event of [EventId.CR, EventId.MSR, EventId.PF, EventId.SINGLESTEP]) {
      expect((await tool.enable(1, event)).error).toBe(KvmError.NONE);
    }
    expect((await tool.command(MessageId.GET_MAX_GFN)).data.readBigUInt64LE()).toBe(BigInt(MEMORY_PAGES));
    const registers = await tool.registers(0, 0xc0000082);
    expect(registers).toMatchObject({ mode: 8, msrCount: 1 });
    expect(registers.regs).toEqual(
      expect.objectContaining({
        rip: fixture.machine.registers(0).rip,
        r15: fixture.machine.registers(0).r15,
      }),
    );
    expect(registers.sregs).toMatchObject({ cr3: 0x1000n, gs: { base: 0xfffff80000002000n } });
  });

  it('a second tool attaches after the first has gone, and finds nothing of the first', async () => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    const again = tool.accept();
    tool.hangUp();
    await again;
    expect(fixture.machine.access(3n)).toBe(PageAccess.ALL);
    fixture.machine.script(0, load(TRAPPED));
    fixture.turn();
    // Page-fault events were enabled by the first tool only.
    await tool.setAccess({ gpa: TRAPPED, access: EXECUTE_ONLY });
    fixture.machine.script(0, load(TRAPPED));
    fixture.turn();
    expect(fixture.machine.retired(0)).toBe(2);
  });
});

describe('violations', () => {
  beforeEach(() => fixture.trap(TRAPPED, EXECUTE_ONLY));

  it('an event carries the exact registers, addresses, and only access bits that were taken away', async () => {
    fixture.machine.script(1, load(TRAPPED + 0x10n));
    fixture.turn();
    const event = await tool.event();
    expect(event).toMatchObject({ vcpu: 1, event: EventId.PF });
    expect(event.pageFault).toMatchObject({
      gva: 0xfffff80000003010n,
      gpa: 0x3010n,
      access: PageAccess.READ,
      view: 0,
    });
    const { rip, rcx, rflags } = fixture.machine.registers(1);
    expect(event.common.regs).toMatchObject({ rip, rcx, rflags });
    expect(event.common.msrs.lstar).toBe(fixture.machine.registers(1).lstar);
  });

  it('the vCPU stands still until its event is answered, the others run on', async () => {
    fixture.machine.script(0, load(TRAPPED), nop);
    fixture.machine.script(1, nop, nop);
    fixture.turn();
    fixture.turn();
    const event = await tool.event();
    expect([fixture.machine.retired(0), fixture.machine.retired(1)]).toEqual([0, 2]);
    tool.answer(event);
    await fixture.sync();
    fixture.turn();
    expect(fixture.machine.retired(0)).toBe(2);
  });

  it('commands are answered while an event is outstanding', async () => {
    fixture.machine.script(0, load(TRAPPED));
    fixture.machine.memory.write('hello', 0x2000);
    fixture.turn();
    expect((await tool.read(0x2000n, 5n)).data.toString()).toBe('hello');
    expect((await tool.registers(0)).regs.rip).toBe(fixture.machine.registers(0).rip);
    expect(tool.pendingEvents).toBe(1);
  });

  it('data is laid over by linear address, from before the access too', async () => {
    fixture.machine.script(0, load(TRAPPED + 0x10n), load(TRAPPED + 0x10n));
    fixture.turn();
    tool.answer(await tool.event(), { data: Buffer.from('0102030405', 'hex') });
    await fixture.sync();
    fixture.turn();
    const event = await tool.event();
    tool.answer(event, {
      address: event.pageFault!.gva - 2n,
      data: Buffer.from('aabb01020304', 'hex'),
    });
    await fixture.sync();
    expect(fixture.machine.log.filter((line) => line.startsWith('complete'))).toEqual([
      'complete 0 0102030405',
      'complete 0 01020304',
    ]);
  });

  it('data that does not cover the whole piece is ignored', async () => {
    fixture.machine.script(0, load(TRAPPED), load(TRAPPED), load(TRAPPED));
    for (const answer of [
      { data: Buffer.from('010203', 'hex') },
      { data: Buffer.alloc(8), address: 0xfffff80000003001n },
      { data: Buffer.alloc(5), address: 0xfffff80000002ffen },
    ]) {
      fixture.turn();
      tool.answer(await tool.event(), answer);
      await fixture.sync();
    }
    expect(fixture.machine.log.filter((line) => line.startsWith('complete'))).toEqual(
      new Array(3).fill('complete 0'),
    );
  });

  it('a page-crossing read is one event a piece, the second after the first is answered', async () => {
    fixture.machine.script(0, { pieces: [readOf(0x3ffen, 2), readOf(0x3000n, 2)] });
    fixture.turn();
    const first = await tool.event();
    expect(tool.pendingEvents).toBe(0);
    tool.answer(first);
    await fixture.sync();
    fixture.turn();
    expect((await tool.event()).pageFault!.gpa).toBe(0x3000n);
  });

  it('RETRY runs the instruction again, which passes once the page is released', async () => {
    fixture.machine.script(0, load(TRAPPED));
    fixture.turn();
    tool.answer(await tool.event(), { action: EventAction.RETRY });
    await fixture.sync();
    fixture.turn();
    const again = await tool.event();
    await tool.setAccess({ gpa: TRAPPED, access: PageAccess.ALL });
    tool.answer(again, { action: EventAction.RETRY });
    await fixture.sync();
    fixture.turn();
    expect(fixture.machine.retired(0)).toBe(1);
    expect(fixture.machine.log).not.toContain('complete 0');
  });

  it('with page-fault events off the access completes without an event', async () => {
    await tool.enable(0, EventId.PF, false);
    fixture.machine.script(0, load(TRAPPED));
    fixture.turn();
    await fixture.sync();
    expect(tool.pendingEvents).toBe(0);
    expect(fixture.machine.retired(0)).toBe(1);
  });
});

describe('pause', () => {
  it('every vCPU raises a PAUSE event and runs nothing until it is answered', async () => {
    fixture.machine.script(0, nop);
    fixture.machine.script(1, nop);
    expect((await tool.pauseAll(2)).error).toBe(KvmError.NONE);
    const events = [await tool.event(), await tool.event()];
    expect(events.map(({ event, vcpu }) => [event, vcpu])).toEqual([
      [EventId.PAUSE_VCPU, 0],
      [EventId.PAUSE_VCPU, 1],
    ]);
    fixture.turn();
    expect(fixture.machine.log).not.toContain('run 0');
    expect(fixture.introspection.blocked).toBe(true);
    tool.answer(events[1]!);
    await fixture.sync();
    fixture.turn();
    expect([fixture.machine.retired(0), fixture.machine.retired(1)]).toEqual([0, 1]);
  });

  it('only the last command of the batch is answered, and behind the events already raised', async () => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    fixture.machine.script(0, load(TRAPPED));
    tool.received.length = 0;
    fixture.turn();
    await tool.pauseAll(2);
    expect(tool.received).toEqual([
      `event ${EventId.PF} vcpu 0`,
      `event ${EventId.PAUSE_VCPU} vcpu 1`,
      `reply ${MessageId.CONTROL_CMD_RESPONSE}`,
    ]);
  });

  it('a PAUSE event pending behind an open event is sent before the vCPU runs on', async () => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    fixture.machine.script(0, load(TRAPPED), nop);
    fixture.turn();
    await tool.pauseAll(2);
    const [fault, paused] = [await tool.event(), await tool.event()];
    expect([fault.event, paused.event, paused.vcpu]).toEqual([EventId.PF, EventId.PAUSE_VCPU, 1]);
    tool.answer(fault);
    expect(await tool.event()).toMatchObject({ event: EventId.PAUSE_VCPU, vcpu: 0 });
    fixture.turn();
    expect(fixture.machine.retired(0)).toBe(1);
    expect(fixture.machine.log.slice(-2)).toEqual(['complete 0', 'pause 0']);
  });

  it('a half-done instruction raises its other piece before the pending PAUSE event', async () => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    fixture.machine.script(0, { pieces: [readOf(0x3ffen, 2), readOf(0x3000n, 2)] });
    fixture.turn();
    await tool.pauseAll(1);
    tool.answer(await tool.event());
    const second = await tool.event();
    expect(second.event).toBe(EventId.PF);
    tool.answer(second);
    expect((await tool.event()).event).toBe(EventId.PAUSE_VCPU);
  });

  it('a vCPU between two pieces of an instruction finishes it before it pauses', async () => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    fixture.machine.script(0, { pieces: [readOf(0x3ffen, 2), readOf(0x3000n, 2)] });
    fixture.turn();
    tool.answer(await tool.event());
    await tool.pauseAll(1);
    expect((await tool.event()).event).toBe(EventId.PF);
  });

  it('is counted: two pauses need two answers, one event at a time', async () => {
    fixture.machine.script(0, nop);
    const pause = () => tool.command(MessageId.PAUSE_VCPU, vcpuHeader.encode({}), pauseVcpu.encode({}));
    await pause();
    await pause();
    const first = await tool.event();
    expect(tool.pendingEvents).toBe(0);
    tool.answer(first);
    const second = await tool.event();
    expect(second.event).toBe(EventId.PAUSE_VCPU);
    fixture.turn();
    expect(fixture.machine.retired(0)).toBe(0);
    tool.answer(second);
    await fixture.sync();
    fixture.turn();
    expect(fixture.machine.retired(0)).toBe(1);
  });

  it('a tool cannot pile up pauses without end', async () => {
    await tool.command(MessageId.PAUSE_VCPU, vcpuHeader.encode({}), pauseVcpu.encode({}));
    tool.post(MessageId.CONTROL_CMD_RESPONSE, controlCmdResponse.encode({ enable: 0, now: 1 }));
    for (let i = 0; i < 1001; i++) {
      tool.post(MessageId.PAUSE_VCPU, vcpuHeader.encode({}), pauseVcpu.encode({}));
    }
    await tool.command(MessageId.CONTROL_CMD_RESPONSE, controlCmdResponse.encode({ enable: 1, now: 1 }));
    const { error } = await tool.command(MessageId.PAUSE_VCPU, vcpuHeader.encode({}), pauseVcpu.encode({}));
    expect(error).toBe(KvmError.EBUSY);
  });
});

describe('registers', () => {
  const changed = (vcpu: number) => ({
    ...fixture.machine.registers(vcpu),
    rax: 0xaaan,
    rbx: 0xbbbn,
    rip: 0x77n,
  });

  it('set on a paused vCPU take effect when its event is answered', async () => {
    await tool.pauseAll(1);
    const event = await tool.event();
    expect((await tool.setRegisters(0, changed(0))).error).toBe(KvmError.NONE);
    expect((await tool.registers(0)).regs.rip).not.toBe(0x77n);
    tool.answer(event);
    expect((await tool.registers(0)).regs).toMatchObject({ rip: 0x77n, rbx: 0xbbbn });
  });

  it('set in a page fault lose to what the completed instruction writes, RIP at least', async () => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    fixture.machine.script(0, load(TRAPPED, { rax: 0x1234n }));
    fixture.turn();
    const event = await tool.event();
    await tool.setRegisters(0, changed(0));
    tool.answer(event);
    expect((await tool.registers(0)).regs).toMatchObject({
      rax: 0x1234n,
      rbx: 0xbbbn,
      rip: event.common.regs.rip + 4n,
    });
  });

  it('set on a running vCPU are dropped, as KVM does', async () => {
    expect((await tool.setRegisters(0, changed(0))).error).toBe(KvmError.NONE);
    await tool.pauseAll(1);
    tool.answer(await tool.event());
    expect((await tool.registers(0)).regs.rip).not.toBe(0x77n);
  });
});

describe('single step', () => {
  it('raises an event after each instruction until it is turned off', async () => {
    await tool.enable(0, EventId.SINGLESTEP);
    await tool.singleStep(0, true);
    fixture.machine.script(0, nop, nop, nop);
    fixture.turn();
    const first = await tool.event();
    expect(first).toMatchObject({ event: EventId.SINGLESTEP, vcpu: 0 });
    tool.answer(first);
    await fixture.sync();
    fixture.turn();
    const second = await tool.event();
    await tool.singleStep(0, false);
    tool.answer(second);
    await fixture.sync();
    fixture.turn();
    expect(fixture.machine.retired(0)).toBe(3);
    await fixture.sync();
    expect(tool.pendingEvents).toBe(0);
  });

  it('asked for in a page fault’s answer, one event follows the instruction', async () => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    await tool.enable(0, EventId.SINGLESTEP);
    fixture.machine.script(0, load(TRAPPED), nop);
    fixture.turn();
    tool.answer(await tool.event(), { singleStep: true });
    const step = await tool.event();
    expect(step.event).toBe(EventId.SINGLESTEP);
    expect(fixture.machine.retired(0)).toBe(1);
    fixture.turn();
    expect(fixture.machine.retired(0)).toBe(1);
    tool.answer(step);
    await fixture.sync();
    fixture.turn();
    expect(fixture.machine.retired(0)).toBe(2);
  });
});

describe('when the tool goes away', () => {
  it('permissions come back, open traps complete, paused vCPUs run', async () => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    await tool.setAccess({ gpa: 0x5000n, access: 0 });
    fixture.machine.script(0, load(TRAPPED), nop);
    fixture.machine.script(1, nop);
    fixture.turn();
    await tool.pauseAll(2);
    const again = tool.accept();
    tool.hangUp();
    await again;
    expect([fixture.machine.access(3n), fixture.machine.access(5n)]).toEqual([
      PageAccess.ALL,
      PageAccess.ALL,
    ]);
    fixture.turn();
    expect([fixture.machine.retired(0), fixture.machine.retired(1)]).toEqual([2, 1]);
    expect(fixture.introspection.outstanding).toBe(0);
  });

  it('a vCPU with a pause still due is not paused later', async () => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    fixture.machine.script(0, load(TRAPPED), nop);
    fixture.turn();
    await tool.pauseAll(1);
    const again = tool.accept();
    tool.hangUp();
    await again;
    fixture.turn();
    expect(fixture.machine.isPaused(0)).toBe(false);
    expect(fixture.machine.retired(0)).toBe(2);
  });
});

describe('a hostile or unknown tool', () => {
  it('any other message is not supported, also while replies are off', async () => {
    const known = new Set<number>(Object.values(MessageId));
    const unknown = Array.from({ length: 128 }, (_, id) => id).filter((id) => !known.has(id));
    for (const id of [...unknown, 0xffff]) {
      expect((await tool.command(id, Buffer.alloc(24))).error, `message ${id}`).toBe(KvmError.EOPNOTSUPP);
    }
    tool.post(MessageId.CONTROL_CMD_RESPONSE, controlCmdResponse.encode({ enable: 0, now: 1 }));
    expect((await tool.command(10, Buffer.alloc(16))).error).toBe(KvmError.EOPNOTSUPP);
  });

  it.each([
    ['no such vCPU', () => tool.enable(2, EventId.PF), KvmError.EINVAL],
    ['no such vCPU at all', () => tool.enable(0xffff, EventId.PF), KvmError.EINVAL],
    ['no such event', () => tool.enable(0, 12), KvmError.EINVAL],
    ['an event that is not intercepted', () => tool.enable(0, EventId.CPUID), KvmError.EOPNOTSUPP],
    ['a read of nothing', () => tool.read(0n, 0n), KvmError.EINVAL],
    ['a read across pages', () => tool.read(0xfffn, 2n), KvmError.EINVAL],
    ['a read of everything', () => tool.read(0n, 0xffffffffffffffffn), KvmError.EINVAL],
    ['a read behind memory', () => tool.read(BigInt(MEMORY_PAGES) << 12n, 1n), KvmError.ENOENT],
    ['a read at the end of the address space', () => tool.read(0xfffffffffffff000n, 1n), KvmError.ENOENT],
    ['a write behind memory', () => tool.write(1n << 40n, Buffer.alloc(8)), KvmError.ENOENT],
    ['an access with unknown bits', () => tool.setAccess({ gpa: 0n, access: 8 }), KvmError.EINVAL],
    [
      'an access of a frame that is not there',
      () => tool.setAccess({ gpa: 1n << 63n, access: 4 }),
      KvmError.ENOENT,
    ],
    [
      'another view',
      () => tool.command(MessageId.SET_PAGE_ACCESS, setPageAccess.encode({ view: 1 })),
      KvmError.EOPNOTSUPP,
    ],
    [
      'padding that is not zero',
      () => tool.command(MessageId.PAUSE_VCPU, vcpuHeader.encode({}), Buffer.from([1, 9, 0, 0, 0, 0, 0, 0])),
      KvmError.EINVAL,
    ],
  ])('%s is an error reply, and the connection stays', async (_name, request, error) => {
    expect((await request()).error).toBe(error);
    expect((await tool.command(MessageId.GET_VERSION)).error).toBe(KvmError.NONE);
  });

  it('an MSR that is not there, or more than fit into a reply, is an error reply', async () => {
    const request = (count: number, ...indices: number[]) => {
      const list = Buffer.alloc(count * 4);
      indices.forEach((msr, i) => {
        list.writeUInt32LE(msr, i * 4);
      });
      const header = Buffer.alloc(8);
      header.writeUInt16LE(count);
      return tool.command(MessageId.GET_REGISTERS, vcpuHeader.encode({}), header, list);
    };
    expect((await request(1, 0x999)).error).toBe(KvmError.EINVAL);
    expect((await request(2000)).error).toBe(KvmError.EINVAL);
  });

  it('the valid entries of a page list count, the first error is reported', async () => {
    const { error } = await tool.setAccess(
      { gpa: 1n << 50n, access: EXECUTE_ONLY },
      { gpa: TRAPPED, access: EXECUTE_ONLY },
      { gpa: 0n, access: 0xff },
    );
    expect(error).toBe(KvmError.ENOENT);
    expect(fixture.machine.access(3n)).toBe(EXECUTE_ONLY);
  });

  it.each([
    ['a body over the limit', () => tool.raw(messageHeader.encode({ id: 2, size: MAX_BODY + 1, seq: 1 }))],
    ['a command cut short', () => tool.post(MessageId.READ_PHYSICAL, Buffer.alloc(8))],
    ['a vCPU command without a vCPU', () => tool.post(MessageId.PAUSE_VCPU)],
    [
      'a write that announces more than it carries',
      () => tool.post(MessageId.WRITE_PHYSICAL, writePhysical.encode({ size: 100n }), Buffer.alloc(99)),
    ],
    [
      'a page list that announces more than it carries',
      () =>
        tool.post(MessageId.SET_PAGE_ACCESS, setPageAccess.encode({ count: 2 }), pageAccessEntry.encode({})),
    ],
    [
      'an MSR list that announces more than it carries',
      () => tool.post(MessageId.GET_REGISTERS, vcpuHeader.encode({}), Buffer.from([9, 0, 0, 0, 0, 0, 0, 0])),
    ],
    ['an answer to nothing', () => tool.post(MessageId.EVENT_REPLY, vcpuHeader.encode({}), Buffer.alloc(8))],
    [
      'an answer of no vCPU',
      () => tool.post(MessageId.EVENT_REPLY, vcpuHeader.encode({ vcpu: 99 }), Buffer.alloc(8)),
    ],
    ['registers cut short', () => tool.post(MessageId.SET_REGISTERS, Buffer.alloc(8 + kvmRegs.size - 1))],
    [
      'a read while replies are off',
      () => {
        tool.post(MessageId.CONTROL_CMD_RESPONSE, controlCmdResponse.encode({ enable: 0, now: 1 }));
        tool.post(MessageId.READ_PHYSICAL, readPhysical.encode({ gpa: 0n, size: 8n }));
      },
    ],
  ])('%s ends the connection, and the next tool is served', async (_name, send) => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    const again = tool.accept();
    send();
    await again;
    expect(fixture.dropped.map(({ code }) => code)).toEqual(['PROTOCOL_VIOLATION']);
    expect(fixture.machine.access(3n)).toBe(PageAccess.ALL);
    expect((await tool.command(MessageId.GET_VERSION)).error).toBe(KvmError.NONE);
  });

  it.each([
    ['CRASH', { action: EventAction.CRASH }],
    ['an action that does not exist', { action: 7 }],
  ])('%s ends the connection and the guest runs on', async (_name, answer) => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    fixture.machine.script(0, load(TRAPPED));
    fixture.turn();
    const event = await tool.event();
    const again = tool.accept();
    tool.answer(event, answer);
    await again;
    expect(fixture.machine.retired(0)).toBe(1);
  });

  it('a second answer to one event ends the connection', async () => {
    await fixture.trap(TRAPPED, EXECUTE_ONLY);
    fixture.machine.script(0, load(TRAPPED));
    fixture.turn();
    const event = await tool.event();
    tool.answer(event);
    tool.answer(event);
    await tool.disconnected();
    expect(fixture.machine.retired(0)).toBe(1);
  });
});

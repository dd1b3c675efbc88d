import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import * as wire from '../../src/host/kvmi-wire.js';
import type { Fields, Layout } from '../../src/host/layout.js';

const { MessageId, encodeMessage, encodeReply, MessageReader } = wire;
const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const zeros = (count: number) => '00'.repeat(count);
/** A 64-bit number's bytes, in hexadecimal. */
const le64 = (value: bigint) => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(value);
  return hex(bytes);
};

describe('layouts', () => {
  it.each<[string, Pick<Layout<Fields>, 'size' | 'fields'>, number]>([
    ['qemuToIntrospector', wire.qemuToIntrospector, 96],
    ['introspectorToQemu', wire.introspectorToQemu, 24],
    ['kvmRegs', wire.kvmRegs, 144],
    ['kvmSegment', wire.kvmSegment, 24],
    ['kvmSregs', wire.kvmSregs, 312],
    ['getRegistersReply', wire.getRegistersReply, 472],
    ['eventMsrs', wire.eventMsrs, 72],
    ['eventCommon', wire.eventCommon, 544],
    ['pageFaultEvent', wire.pageFaultEvent, 24],
    ['pageFaultReply', wire.pageFaultReply, 272],
  ])('%s has the size of the C structure, and no member overlaps another', (_name, layout, size) => {
    expect(layout.size).toBe(size);
    const members = Object.values(layout.fields).sort((a, b) => a.offset - b.offset);
    let end = 0;
    for (const { offset, size: length } of members) {
      expect(offset).toBeGreaterThanOrEqual(end);
      end = offset + length;
    }
    expect(end).toBeLessThanOrEqual(size);
  });

  it('what is encoded is decoded again', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 544, maxLength: 544 }), (random) => {
        const bytes = Buffer.from(random);
        const values = wire.eventCommon.decode(bytes);
        expect(wire.eventCommon.decode(wire.eventCommon.encode(values))).toEqual(values);
      }),
    );
  });

  it('a structure cut short is a protocol violation', () => {
    for (let length = 0; length < wire.eventCommon.size; length++) {
      expect(() => wire.eventCommon.decode(Buffer.alloc(length))).toThrow(
        expect.objectContaining({ code: 'PROTOCOL_VIOLATION' }),
      );
    }
  });
});

describe('messages, byte for byte', () => {
  it.each([
    ['GET_VERSION', encodeMessage(MessageId.GET_VERSION, 1), '0200000001000000'],
    [
      'READ_PHYSICAL',
      encodeMessage(
        MessageId.READ_PHYSICAL,
        0x01020304,
        wire.readPhysical.encode({ gpa: 0x1000n, size: 4096n }),
      ),
      `1100100004030201${le64(0x1000n)}${le64(4096n)}`,
    ],
    [
      'WRITE_PHYSICAL',
      encodeMessage(
        MessageId.WRITE_PHYSICAL,
        2,
        wire.writePhysical.encode({ gpa: 0x2345n, size: 2n }),
        Buffer.from([0xaa, 0xbb]),
      ),
      `1200120002000000${le64(0x2345n)}${le64(2n)}aabb`,
    ],
    [
      'SET_PAGE_ACCESS',
      encodeMessage(
        MessageId.SET_PAGE_ACCESS,
        3,
        wire.setPageAccess.encode({ count: 1 }),
        wire.pageAccessEntry.encode({ gpa: 0x5000n, access: wire.PageAccess.EXECUTE }),
      ),
      `1500180003000000${'0000010000000000'}${le64(0x5000n)}0400000000000000`,
    ],
    [
      'PAUSE_VCPU',
      encodeMessage(
        MessageId.PAUSE_VCPU,
        4,
        wire.vcpuHeader.encode({ vcpu: 3 }),
        wire.pauseVcpu.encode({ wait: 1 }),
      ),
      '070010000400000003000000000000000100000000000000',
    ],
    [
      'CONTROL_EVENTS',
      encodeMessage(
        MessageId.CONTROL_EVENTS,
        5,
        wire.vcpuHeader.encode({ vcpu: 1 }),
        wire.controlEvents.encode({ event: wire.EventId.PF, enable: 1 }),
      ),
      '090010000500000001000000000000000600010000000000',
    ],
    [
      'VCPU_CONTROL_SINGLESTEP',
      encodeMessage(
        MessageId.VCPU_CONTROL_SINGLESTEP,
        6,
        wire.vcpuHeader.encode({ vcpu: 1 }),
        wire.controlSingleStep.encode({ enable: 1 }),
      ),
      '3f0010000600000001000000000000000100000000000000',
    ],
    [
      'CONTROL_CMD_RESPONSE',
      encodeMessage(MessageId.CONTROL_CMD_RESPONSE, 7, wire.controlCmdResponse.encode({ enable: 0, now: 1 })),
      '1b000800070000000001000000000000',
    ],
    [
      'GET_REGISTERS',
      encodeMessage(
        MessageId.GET_REGISTERS,
        8,
        wire.vcpuHeader.encode({ vcpu: 1 }),
        wire.getRegisters.encode({ msrCount: 1 }),
        Buffer.from('820000c0', 'hex'),
      ),
      '0d0014000800000001000000000000000100000000000000820000c0',
    ],
    [
      'EVENT_REPLY to a page fault',
      encodeMessage(
        MessageId.EVENT_REPLY,
        9,
        wire.vcpuHeader.encode({ vcpu: 1 }),
        wire.eventReply.encode({ action: wire.EventAction.CONTINUE, event: wire.EventId.PF }),
        wire.pageFaultReply.encode({
          ctxAddress: 0xfffff80000001234n,
          ctxSize: 3,
          singleStep: 1,
          ctxData: Buffer.from([1, 2, 3]),
        }),
      ),
      `00002001090000000100000000000000${'0006000000000000'}${le64(0xfffff80000001234n)}0300000001000000010203${zeros(253)}`,
    ],
    [
      'a reply',
      encodeReply(
        { id: MessageId.GET_MAX_GFN, seq: 10, body: Buffer.alloc(0) },
        0,
        wire.getMaxGfnReply.encode({ gfn: 0x4000n }),
      ),
      `1d0010000a000000${zeros(8)}${le64(0x4000n)}`,
    ],
    [
      'an error reply, which carries no data',
      encodeReply({ id: 99, seq: 11, body: Buffer.alloc(0) }, wire.KvmError.EOPNOTSUPP, Buffer.alloc(16)),
      '630008000b000000a1ffffff00000000',
    ],
    [
      'the hypervisor’s handshake',
      wire.qemuToIntrospector.encode({
        structSize: 96,
        uuid: Buffer.alloc(16, 0x11),
        startTime: 5n,
        name: Buffer.from('vm'),
      }),
      `60000000${'11'.repeat(16)}00000000${le64(5n)}766d${zeros(62)}`,
    ],
  ])('%s', (_name, bytes, expected) => {
    expect(hex(bytes)).toBe(expected);
  });

  it('SET_REGISTERS and an event have every register where KVM has it', () => {
    const names = [
      ...['rax', 'rbx', 'rcx', 'rdx', 'rsi', 'rdi', 'rsp', 'rbp'],
      ...['r8', 'r9', 'r10', 'r11', 'r12', 'r13', 'r14', 'r15', 'rip', 'rflags'],
    ];
    const values = Object.fromEntries(names.map((name, i) => [name, BigInt(i + 1)]));
    const expected = names.map((_, i) => le64(BigInt(i + 1))).join('');
    expect(hex(wire.kvmRegs.encode(values))).toBe(expected);
    const event = wire.eventCommon.encode({ regs: wire.kvmRegs.decode(wire.kvmRegs.encode(values)) });
    expect(hex(event.subarray(16, 16 + 144))).toBe(expected);
  });

  it('an event has segments, tables and control registers where KVM has them', () => {
    const sregs = wire.kvmSregs.decode(Buffer.alloc(wire.kvmSregs.size));
    const segment = {
      ...sregs.cs,
      base: 0x1122334455667788n,
      limit: 0xffffffff,
      selector: 0x10,
      type: 11,
      l: 1,
    };
    const event = wire.eventCommon.encode({
      sregs: {
        ...sregs,
        cs: segment,
        gs: segment,
        idt: { base: 0x99n, limit: 0xfff },
        cr3: 0x1ad000n,
        efer: 0xd01n,
      },
    });
    const bytes = `8877665544332211ffffffff10000b0000000001${zeros(4)}`;
    expect(hex(event.subarray(160, 160 + 24))).toBe(bytes);
    expect(hex(event.subarray(160 + 96, 160 + 120))).toBe(bytes);
    expect(hex(event.subarray(160 + 208, 160 + 224))).toBe(`${le64(0x99n)}ff0f${zeros(6)}`);
    expect(event.readBigUInt64LE(160 + 240)).toBe(0x1ad000n);
    expect(event.readBigUInt64LE(160 + 264)).toBe(0xd01n);
  });
});

describe('framing', () => {
  it('a stream is cut into the same messages however it arrives', () => {
    const bodies = fc.array(fc.uint8Array({ maxLength: 40 }), { maxLength: 6 });
    fc.assert(
      fc.property(bodies, fc.array(fc.integer({ min: 1, max: 30 })), (sent, cuts) => {
        const stream = Buffer.concat(sent.map((body, seq) => encodeMessage(seq + 1, seq, body)));
        const reader = new MessageReader();
        const got = [];
        let at = 0;
        for (const cut of [...cuts, stream.length]) {
          got.push(...reader.push(stream.subarray(at, at + cut)));
          at = Math.min(at + cut, stream.length);
        }
        expect(got.map(({ id, seq, body }) => [id, seq, hex(body)])).toEqual(
          sent.map((body, seq) => [seq + 1, seq, hex(body)]),
        );
      }),
    );
  });

  it('a body over the protocol’s size is refused, when announced and when sent', () => {
    expect(() =>
      new MessageReader().push(wire.messageHeader.encode({ id: 2, size: wire.MAX_BODY + 1 })),
    ).toThrow(expect.objectContaining({ code: 'PROTOCOL_VIOLATION' }));
    expect(() => encodeMessage(1, 1, Buffer.alloc(wire.MAX_BODY + 1))).toThrow(
      expect.objectContaining({ code: 'PROTOCOL_VIOLATION' }),
    );
  });
});

// The KVMI protocol's wire: message ids, structures and framing. Little endian.
import { MemtablesError } from '../errors.js';
import { bytes, i32, Layout, nested, u8, u16, u32, u64, type ValuesOf } from './layout.js';

export const KVMI_VERSION = 1;

/** The messages a KVM introspection tool sends through libvmi, and the hypervisor's own `EVENT`. */
export const MessageId = {
  EVENT_REPLY: 0,
  EVENT: 1,
  GET_VERSION: 2,
  GET_GUEST_INFO: 5,
  PAUSE_VCPU: 7,
  CONTROL_EVENTS: 9,
  GET_REGISTERS: 13,
  SET_REGISTERS: 14,
  READ_PHYSICAL: 17,
  WRITE_PHYSICAL: 18,
  SET_PAGE_ACCESS: 21,
  CONTROL_CMD_RESPONSE: 27,
  GET_MAX_GFN: 29,
  VCPU_CONTROL_SINGLESTEP: 63,
} as const;

/** The events a vCPU can raise; `NUM_EVENTS` bounds the ids. */
export const EventId = {
  UNHOOK: 0,
  CR: 1,
  MSR: 2,
  XSETBV: 3,
  BREAKPOINT: 4,
  HYPERCALL: 5,
  PF: 6,
  TRAP: 7,
  DESCRIPTOR: 8,
  CREATE_VCPU: 9,
  PAUSE_VCPU: 10,
  SINGLESTEP: 11,
  CPUID: 13,
} as const;

export const EventAction = { CONTINUE: 0, RETRY: 1, CRASH: 2 } as const;

/** Bits of a page's access, in `SET_PAGE_ACCESS` and in a page-fault event. */
export const PageAccess = { READ: 1, WRITE: 2, EXECUTE: 4, ALL: 7 } as const;

/** What an error reply carries: KVM's own error numbers, negated. */
export const KvmError = { NONE: 0, ENOENT: -2, EBUSY: -16, EINVAL: -22, EOPNOTSUPP: -95 } as const;

/** The largest body of a message: two pages with the header. */
export const MAX_BODY = 8184;
/** The largest answer that `ctx_data` of a page-fault reply can carry. */
export const MAX_SUBSTITUTE = 256;
/** Only this much of a peer's handshake is read over before it is refused. */
export const MAX_HANDSHAKE = 64 * 1024;

export const qemuToIntrospector = new Layout(96, {
  structSize: u32(0),
  uuid: bytes(4, 16),
  startTime: u64(24),
  name: bytes(32, 64),
});
export const introspectorToQemu = new Layout(24, { structSize: u32(0), cookieHash: bytes(4, 20) });

export const messageHeader = new Layout(8, { id: u16(0), size: u16(2), seq: u32(4) });
export const errorCode = new Layout(8, { error: i32(0) });
export const vcpuHeader = new Layout(8, { vcpu: u16(0) });

export const getVersionReply = new Layout(16, {
  version: u32(0),
  spp: u8(8),
  vmfunc: u8(9),
  eptp: u8(10),
  ve: u8(11),
});
export const getGuestInfoReply = new Layout(16, { vcpuCount: u32(0) });
export const getMaxGfnReply = new Layout(8, { gfn: u64(0) });

export const pauseVcpu = new Layout(8, { wait: u8(0) });
export const controlEvents = new Layout(8, { event: u16(0), enable: u8(2) });
export const controlCmdResponse = new Layout(8, { enable: u8(0), now: u8(1) });
export const controlSingleStep = new Layout(8, { enable: u8(0) });
export const readPhysical = new Layout(16, { gpa: u64(0), size: u64(8) });
/** Followed by `size` bytes. */
export const writePhysical = new Layout(16, { gpa: u64(0), size: u64(8) });
/** Followed by `count` of `pageAccessEntry`. */
export const setPageAccess = new Layout(8, { view: u16(0), count: u16(2) });
export const pageAccessEntry = new Layout(16, { gpa: u64(0), access: u8(8) });
/** Followed by `msrCount` indices, 32 bits each. */
export const getRegisters = new Layout(8, { msrCount: u16(0) });
export const MSR_INDEX_SIZE = 4;

export const kvmRegs = new Layout(144, {
  rax: u64(0),
  rbx: u64(8),
  rcx: u64(16),
  rdx: u64(24),
  rsi: u64(32),
  rdi: u64(40),
  rsp: u64(48),
  rbp: u64(56),
  r8: u64(64),
  r9: u64(72),
  r10: u64(80),
  r11: u64(88),
  r12: u64(96),
  r13: u64(104),
  r14: u64(112),
  r15: u64(120),
  rip: u64(128),
  rflags: u64(136),
});

export const kvmSegment = new Layout(24, {
  base: u64(0),
  limit: u32(8),
  selector: u16(12),
  type: u8(14),
  present: u8(15),
  dpl: u8(16),
  db: u8(17),
  s: u8(18),
  l: u8(19),
  g: u8(20),
});
export const kvmTable = new Layout(16, { base: u64(0), limit: u16(8) });
export const kvmSregs = new Layout(312, {
  cs: nested(0, kvmSegment),
  ds: nested(24, kvmSegment),
  es: nested(48, kvmSegment),
  fs: nested(72, kvmSegment),
  gs: nested(96, kvmSegment),
  ss: nested(120, kvmSegment),
  tr: nested(144, kvmSegment),
  ldt: nested(168, kvmSegment),
  gdt: nested(192, kvmTable),
  idt: nested(208, kvmTable),
  cr0: u64(224),
  cr2: u64(232),
  cr3: u64(240),
  cr4: u64(248),
  cr8: u64(256),
  efer: u64(264),
  apicBase: u64(272),
});

/** Followed by `msrCount` of `msrEntry`. */
export const getRegistersReply = new Layout(472, {
  mode: u32(0),
  regs: nested(8, kvmRegs),
  sregs: nested(152, kvmSregs),
  msrCount: u32(464),
});
export const msrEntry = new Layout(16, { index: u32(0), data: u64(8) });

export const eventMsrs = new Layout(72, {
  sysenterCs: u64(0),
  sysenterEsp: u64(8),
  sysenterEip: u64(16),
  efer: u64(24),
  star: u64(32),
  lstar: u64(40),
  cstar: u64(48),
  pat: u64(56),
  shadowGs: u64(64),
});
/** How every event begins; `size` is the size of this structure. */
export const eventCommon = new Layout(544, {
  size: u16(0),
  vcpu: u16(2),
  event: u8(4),
  mode: u8(8),
  view: u16(10),
  regs: nested(16, kvmRegs),
  sregs: nested(160, kvmSregs),
  msrs: nested(472, eventMsrs),
});
export const pageFaultEvent = new Layout(24, { gva: u64(0), gpa: u64(8), access: u8(16), view: u16(18) });
export const singleStepEvent = new Layout(8, { failed: u8(0) });

/** How every event's reply begins, behind the vCPU header. */
export const eventReply = new Layout(8, { action: u8(0), event: u8(1) });
export const pageFaultReply = new Layout(272, {
  ctxAddress: u64(0),
  ctxSize: u32(8),
  singleStep: u8(12),
  repComplete: u8(13),
  ctxData: bytes(16, MAX_SUBSTITUTE),
});

export type KvmRegs = ValuesOf<typeof kvmRegs>;
export type KvmSregs = ValuesOf<typeof kvmSregs>;
export type EventMsrs = ValuesOf<typeof eventMsrs>;
export type PageFaultReply = ValuesOf<typeof pageFaultReply>;

/** One message: a command, a command's reply, an event or an event's reply. */
export interface Message {
  readonly id: number;
  readonly seq: number;
  readonly body: Buffer;
}

/** The message as one buffer, which has to leave in one `send`. */
export function encodeMessage(id: number, seq: number, ...parts: readonly Uint8Array[]): Buffer {
  const size = parts.reduce((sum, part) => sum + part.length, 0);
  if (size > MAX_BODY) {
    throw new MemtablesError('PROTOCOL_VIOLATION', `a message body of ${size} bytes cannot be sent`, {
      remedy: `Keep it within ${MAX_BODY} bytes.`,
      context: { id, size },
    });
  }
  return Buffer.concat([messageHeader.encode({ id, size, seq }), ...parts]);
}

/** A command's reply; an error reply carries nothing but the error. */
export function encodeReply(command: Message, error: number, ...parts: readonly Uint8Array[]): Buffer {
  return encodeMessage(
    command.id,
    command.seq,
    errorCode.encode({ error }),
    ...(error === KvmError.NONE ? parts : []),
  );
}

/** Cuts a byte stream into messages. */
export class MessageReader {
  private pending: Buffer = Buffer.alloc(0);

  /**
   * Returns the messages that `chunk` completes, in order; keeps what is left for the next call.
   * @throws MemtablesError `PROTOCOL_VIOLATION` for a message over the protocol's size
   */
  push(chunk: Uint8Array): Message[] {
    this.pending = this.pending.length === 0 ? Buffer.from(chunk) : Buffer.concat([this.pending, chunk]);
    const messages: Message[] = [];
    while (this.pending.length >= messageHeader.size) {
      const { id, size, seq } = messageHeader.decode(this.pending);
      if (size > MAX_BODY) {
        throw new MemtablesError('PROTOCOL_VIOLATION', `a message announces a body of ${size} bytes`, {
          remedy: 'Check that both ends speak the same version of the protocol.',
          context: { id, size, most: MAX_BODY },
        });
      }
      const end = messageHeader.size + size;
      if (this.pending.length < end) break;
      messages.push({ id, seq, body: this.pending.subarray(messageHeader.size, end) });
      this.pending = this.pending.subarray(end);
    }
    return messages;
  }
}

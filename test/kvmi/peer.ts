import { connect, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';

// Written from the protocol's figures and not with the host's codec: the golden bytes here check that one too.
export const Id = {
  eventReply: 0,
  event: 1,
  getVersion: 2,
  getGuestInfo: 5,
  pauseVcpu: 7,
  controlEvents: 9,
  getRegisters: 13,
  setRegisters: 14,
  readPhysical: 17,
  writePhysical: 18,
  setPageAccess: 21,
  controlCommandResponse: 27,
  getMaxGfn: 29,
  controlSingleStep: 63,
} as const;

/** Commands whose body begins with the number of a vCPU. */
const OF_A_VCPU: ReadonlySet<number> = new Set([
  Id.pauseVcpu,
  Id.controlEvents,
  Id.getRegisters,
  Id.setRegisters,
  Id.controlSingleStep,
]);

export const EventId = {
  controlRegister: 1,
  msr: 2,
  breakpoint: 4,
  pageFault: 6,
  pause: 10,
  singleStep: 11,
} as const;

export const Access = { read: 1, write: 2, execute: 4 } as const;

export const PAGE = 4096;
const HEADER = 8;
const GREETING_REPLY = 24;
const EVENT_COMMON = 544;
const GENERAL_REGISTERS = 16;
const SPECIAL_REGISTERS = 160;
const EINVAL = -22;

export interface Message {
  readonly id: number;
  readonly seq: number;
  readonly body: Buffer;
}

/** The body of a successful reply, an error number, or nothing at all. */
export type Answer = Buffer | number | 'silence';

export interface PeerOptions {
  readonly vcpus?: number;
  readonly memory?: Buffer;
  readonly version?: number;
  /** Instead of the 96 bytes of a proper greeting. */
  readonly greeting?: Buffer;
}

export function greeting(size = 96): Buffer {
  const bytes = Buffer.alloc(Math.max(size, 96));
  bytes.writeUInt32LE(size, 0);
  bytes.write('guest', 32);
  return bytes;
}

export function message(id: number, seq: number, body: Uint8Array): Buffer {
  const header = Buffer.alloc(HEADER);
  header.writeUInt16LE(id, 0);
  header.writeUInt16LE(body.length & 0xffff, 2);
  header.writeUInt32LE(seq >>> 0, 4);
  return Buffer.concat([header, body]);
}

/** What all events begin with; general registers hold 0x100, 0x101, … in KVM's order, CR3 holds 0x1aa000. */
export function eventCommon(vcpu: number, event: number, view = 0): Buffer {
  const bytes = Buffer.alloc(EVENT_COMMON);
  bytes.writeUInt16LE(EVENT_COMMON, 0);
  bytes.writeUInt16LE(vcpu, 2);
  bytes.writeUInt8(event, 4);
  bytes.writeUInt8(8, 8);
  bytes.writeUInt16LE(view, 10);
  generalRegisters().copy(bytes, GENERAL_REGISTERS);
  specialRegisters().copy(bytes, SPECIAL_REGISTERS);
  bytes.fill(0xee, SPECIAL_REGISTERS + 312);
  return bytes;
}

export function generalRegisters(): Buffer {
  const bytes = Buffer.alloc(144);
  for (let i = 0; i < 18; i++) bytes.writeBigUInt64LE(0x100n + BigInt(i), i * 8);
  return bytes;
}

/** Of a vCPU in 64-bit kernel code. */
export function specialRegisters(): Buffer {
  const bytes = Buffer.alloc(312);
  ['cs', 'ds', 'es', 'fs', 'gs', 'ss', 'tr', 'ldt'].forEach((_, i) => {
    const at = i * 24;
    bytes.writeBigUInt64LE(0x5000n + BigInt(i), at);
    bytes.writeUInt32LE(0xffff0 + i, at + 8);
    bytes.writeUInt16LE(0x10 + i, at + 12);
    // type, present, dpl, db, s, l, g, avl
    bytes.set([0xb, 1, 3, 0, 1, 1, 1, 0], at + 14);
  });
  bytes.writeBigUInt64LE(0xfffff800_00001000n, 192);
  bytes.writeUInt16LE(0x57, 200);
  bytes.writeBigUInt64LE(0xfffff800_00002000n, 208);
  bytes.writeUInt16LE(0xfff, 216);
  bytes.writeBigUInt64LE(0x80050033n, 224);
  bytes.writeBigUInt64LE(0xc2n, 232);
  bytes.writeBigUInt64LE(0x1aa000n, 240);
  bytes.writeBigUInt64LE(0x3506f8n, 248);
  bytes.writeBigUInt64LE(0xd01n, 264);
  return bytes;
}

export function pageFault(gva: bigint, gpa: bigint, access: number): Buffer {
  const bytes = Buffer.alloc(24);
  bytes.writeBigUInt64LE(gva, 0);
  bytes.writeBigUInt64LE(gpa, 8);
  bytes.writeUInt8(access, 16);
  return bytes;
}

/**
 * The hypervisor's side of a session, as QEMU and KVM would speak it, with every command answered and recorded.
 * A test changes single answers with `answers`, and raises events itself.
 */
export class ScriptedPeer {
  readonly received: Message[] = [];
  /** By message id; overrides the usual answer. */
  readonly answers = new Map<number, (message: Message) => Answer>();
  /** Events are sent with `raw`, so replies to unknown ones are no surprise. */
  toleratesAnyReply = false;
  /** A paused vCPU reports so. */
  reportsPauses = true;
  closed = false;
  /** The EPT view that events come from. */
  view = 0;
  /** Changes the special registers that a vCPU tells. */
  special: (bytes: Buffer) => void = () => {};

  readonly memory: Buffer;
  readonly vcpus: number;
  private readonly version: number;
  /** What the introspector answered to the greeting; empty until then. */
  greetingReply = Buffer.alloc(0);
  private incoming = Buffer.alloc(0);
  private replies = true;
  private nextSeq = 0x7000;
  private readonly waiters: { matches: (m: Message) => boolean; resolve: (m: Message) => void }[] = [];
  /** By vCPU: the number of the event that is not answered yet. */
  private readonly outstanding = new Map<number, number>();
  private readonly pausesDue = new Set<number>();

  private constructor(
    private readonly socket: Socket,
    options: PeerOptions,
  ) {
    this.memory = options.memory ?? Buffer.alloc(64 * PAGE);
    this.vcpus = options.vcpus ?? 2;
    this.version = options.version ?? 1;
    socket.on('data', (bytes) => this.take(bytes));
    socket.on('close', () => {
      this.closed = true;
    });
    socket.on('error', () => {});
    socket.write(options.greeting ?? greeting());
  }

  /** Retries until the introspector has made its socket, as QEMU does. */
  static async connect(path: string, options: PeerOptions = {}): Promise<ScriptedPeer> {
    for (;;) {
      const socket = await new Promise<Socket | undefined>((resolve) => {
        const attempt = connect(path);
        attempt.once('connect', () => resolve(attempt));
        attempt.once('error', () => resolve(undefined));
      });
      if (socket !== undefined) return new ScriptedPeer(socket, options);
      await sleep(5);
    }
  }

  /** Commands of one kind, in order. */
  all(id: number): Message[] {
    return this.received.filter((m) => m.id === id);
  }

  /** `id:body` of what has been received since, in hexadecimal. */
  log(from = 0): string[] {
    return this.received.slice(from).map((m) => `${m.id}:${m.body.toString('hex')}`);
  }

  /** Stops a vCPU at an event and returns the event's number. */
  raise(vcpu: number, event: number, specific: Uint8Array = Buffer.alloc(0)): number {
    const seq = this.nextSeq++;
    this.outstanding.set(vcpu, seq);
    this.send(Id.event, seq, Buffer.concat([eventCommon(vcpu, event, this.view), specific]));
    return seq;
  }

  raisePageFault(vcpu: number, gva: bigint, gpa: bigint, access: number = Access.read): number {
    return this.raise(vcpu, EventId.pageFault, pageFault(gva, gpa, access));
  }

  /** The answer to an event. */
  reply(seq: number): Promise<Message> {
    return this.message((m) => m.id === Id.eventReply && m.seq === seq);
  }

  /** The first message received, so far or from now on, that matches. */
  message(matches: (m: Message) => boolean): Promise<Message> {
    const found = this.received.find(matches);
    if (found !== undefined) return Promise.resolve(found);
    return new Promise((resolve) => this.waiters.push({ matches, resolve }));
  }

  send(id: number, seq: number, body: Uint8Array): void {
    this.raw(message(id, seq, body));
  }

  raw(bytes: Uint8Array): void {
    this.socket.write(bytes);
  }

  close(): void {
    this.socket.destroy();
  }

  private take(bytes: Buffer): void {
    this.incoming = Buffer.concat([this.incoming, bytes]);
    if (this.greetingReply.length === 0) {
      if (this.incoming.length < GREETING_REPLY) return;
      this.greetingReply = this.incoming.subarray(0, GREETING_REPLY);
      this.incoming = this.incoming.subarray(GREETING_REPLY);
    }
    while (this.incoming.length >= HEADER) {
      const size = this.incoming.readUInt16LE(2);
      if (this.incoming.length < HEADER + size) return;
      const received: Message = {
        id: this.incoming.readUInt16LE(0),
        seq: this.incoming.readUInt32LE(4),
        body: Buffer.from(this.incoming.subarray(HEADER, HEADER + size)),
      };
      this.incoming = this.incoming.subarray(HEADER + size);
      this.received.push(received);
      this.handle(received);
      for (const waiter of this.waiters) if (waiter.matches(received)) waiter.resolve(received);
    }
  }

  private handle(received: Message): void {
    if (received.id === Id.eventReply) {
      const vcpu = received.body.readUInt16LE(0);
      if (this.outstanding.get(vcpu) !== received.seq && !this.toleratesAnyReply)
        throw new Error(`reply to no event of vCPU ${vcpu}`);
      this.outstanding.delete(vcpu);
      // A pending pause comes before the vCPU runs another instruction.
      if (this.pausesDue.delete(vcpu)) this.raise(vcpu, EventId.pause);
      return;
    }
    if (received.id === Id.controlCommandResponse) this.replies = received.body.readUInt8(0) === 1;
    const answer = this.answers.get(received.id)?.(received) ?? this.usual(received);
    if (answer === 'silence' || !this.replies) return;
    const status = Buffer.alloc(8);
    if (typeof answer === 'number') status.writeInt32LE(answer, 0);
    this.send(
      received.id,
      received.seq,
      typeof answer === 'number' ? status : Buffer.concat([status, answer]),
    );
  }

  private usual({ id, body }: Message): Answer {
    if (OF_A_VCPU.has(id) && body.readUInt16LE(0) >= this.vcpus) return EINVAL;
    switch (id) {
      case Id.getVersion: {
        const reply = Buffer.alloc(16);
        reply.writeUInt32LE(this.version, 0);
        return reply;
      }
      case Id.getGuestInfo: {
        const reply = Buffer.alloc(16);
        reply.writeUInt32LE(this.vcpus, 0);
        return reply;
      }
      case Id.getMaxGfn: {
        const reply = Buffer.alloc(8);
        reply.writeBigUInt64LE(BigInt(this.memory.length / PAGE), 0);
        return reply;
      }
      case Id.readPhysical: {
        const [gpa, size] = [Number(body.readBigUInt64LE(0)), Number(body.readBigUInt64LE(8))];
        return gpa + size <= this.memory.length ? this.memory.subarray(gpa, gpa + size) : EINVAL;
      }
      case Id.writePhysical: {
        const gpa = Number(body.readBigUInt64LE(0));
        if (gpa + body.length - 16 > this.memory.length) return EINVAL;
        body.copy(this.memory, gpa, 16);
        return Buffer.alloc(0);
      }
      case Id.getRegisters:
        return registersReply(body, this.special);
      case Id.pauseVcpu: {
        const vcpu = body.readUInt16LE(0);
        if (!this.reportsPauses) return Buffer.alloc(0);
        if (this.outstanding.has(vcpu)) this.pausesDue.add(vcpu);
        else this.raise(vcpu, EventId.pause);
        return Buffer.alloc(0);
      }
      default:
        return Buffer.alloc(0);
    }
  }
}

/** The MSRs hold their own index plus 0x10000000. */
function registersReply(request: Buffer, change: (special: Buffer) => void): Buffer {
  const count = request.readUInt16LE(8);
  const fixed = Buffer.alloc(472);
  fixed.writeUInt32LE(8, 0);
  generalRegisters().copy(fixed, 8);
  const special = specialRegisters();
  change(special);
  special.copy(fixed, 152);
  fixed.writeUInt32LE(count, 464);
  const msrs = Buffer.alloc(16 * count);
  for (let i = 0; i < count; i++) {
    const index = request.readUInt32LE(16 + 4 * i);
    msrs.writeUInt32LE(index, 16 * i);
    // EFER has to say long mode
    const value = index === 0xc0000080 ? 0xd01n : BigInt(index) + 0x1_0000_0000n;
    msrs.writeBigUInt64LE(value, 16 * i + 8);
  }
  return Buffer.concat([fixed, msrs]);
}

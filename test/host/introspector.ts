// An introspection tool's end of KVMI, for tests: what libvmi sends, and what no sane tool would.
import { once } from 'node:events';
import { createServer, type Server, type Socket } from 'node:net';
import {
  controlCmdResponse,
  controlEvents,
  controlSingleStep,
  EventAction,
  EventId,
  encodeMessage,
  errorCode,
  eventCommon,
  eventReply,
  getRegisters,
  getRegistersReply,
  introspectorToQemu,
  type KvmRegs,
  kvmRegs,
  type Message,
  MessageId,
  MessageReader,
  pageAccessEntry,
  pageFaultEvent,
  pageFaultReply,
  pauseVcpu,
  qemuToIntrospector,
  readPhysical,
  setPageAccess,
  vcpuHeader,
  writePhysical,
} from '../../src/host/kvmi-wire.js';
import type { ValuesOf } from '../../src/host/layout.js';

export interface ToolEvent {
  readonly seq: number;
  readonly vcpu: number;
  readonly event: number;
  readonly common: ValuesOf<typeof eventCommon>;
  /** Of a page fault. */
  readonly pageFault?: ValuesOf<typeof pageFaultEvent>;
}

export interface Reply {
  readonly error: number;
  /** What follows the error. */
  readonly data: Buffer;
}

export interface AnswerOptions {
  readonly action?: number;
  /** Bytes that a page fault's read is answered with, from `address` (default: the event's gva). */
  readonly data?: Uint8Array;
  readonly address?: bigint;
  readonly singleStep?: boolean;
}

/** Listens like libvmi; `accept` waits for the hypervisor and shakes hands. */
export class Introspector {
  private socket: Socket | undefined;
  private reader = new MessageReader();
  private seq = 1;
  private closed = false;
  private greeting = Buffer.alloc(0);
  private readonly replies = new Map<number, (reply: Reply) => void>();
  private readonly events: ToolEvent[] = [];
  private readonly waiters: (() => void)[] = [];
  /** Everything received, in order: replies as `reply ID`, events as `event ID vcpu`. */
  readonly received: string[] = [];

  private constructor(private readonly server: Server) {}

  static async listen(path: string): Promise<Introspector> {
    const server = createServer({ pauseOnConnect: true });
    server.listen(path);
    await once(server, 'listening');
    return new Introspector(server);
  }

  /** Waits for the hypervisor to connect; returns its handshake after having answered it. */
  async accept(): Promise<ValuesOf<typeof qemuToIntrospector>> {
    const [socket] = (await once(this.server, 'connection')) as [Socket];
    this.socket = socket;
    this.closed = false;
    this.reader = new MessageReader();
    this.greeting = Buffer.alloc(0);
    this.events.length = 0;
    socket.on('error', () => {});
    socket.on('close', () => {
      this.closed = true;
      this.notify();
    });
    socket.on('data', (bytes: Buffer) => this.take(bytes));
    socket.resume();
    await this.until(() => this.greeting.length >= qemuToIntrospector.size);
    socket.write(introspectorToQemu.encode({ structSize: introspectorToQemu.size }));
    return qemuToIntrospector.decode(this.greeting);
  }

  /** Sends raw bytes. */
  raw(bytes: Uint8Array): void {
    this.socket!.write(bytes);
  }

  /** Sends a command without waiting for anything; returns its seq. */
  post(id: number, ...parts: Uint8Array[]): number {
    this.raw(encodeMessage(id, ++this.seq, ...parts));
    return this.seq;
  }

  /** Sends a command and waits for its reply; rejects when the connection ends instead. */
  async command(id: number, ...parts: Uint8Array[]): Promise<Reply> {
    return this.replyTo(this.post(id, ...parts));
  }

  async replyTo(seq: number): Promise<Reply> {
    let reply: Reply | undefined;
    this.replies.set(seq, (value) => {
      reply = value;
    });
    await this.until(() => reply !== undefined || this.closed);
    if (!reply) throw new Error('the connection was closed');
    return reply;
  }

  /** The next event, in the order they were sent. */
  async event(): Promise<ToolEvent> {
    await this.until(() => this.events.length > 0 || this.closed);
    const event = this.events.shift();
    if (!event) throw new Error('the connection was closed');
    return event;
  }

  /** Events that have arrived and were not taken yet. */
  get pendingEvents(): number {
    return this.events.length;
  }

  /** Answers an event. */
  answer(event: ToolEvent, options: AnswerOptions = {}): void {
    const { action = EventAction.CONTINUE, data, singleStep } = options;
    const parts = [
      vcpuHeader.encode({ vcpu: event.vcpu }),
      eventReply.encode({ action, event: event.event }),
    ];
    if (event.event === EventId.PF) {
      parts.push(
        pageFaultReply.encode({
          singleStep: singleStep ? 1 : 0,
          ...(data && {
            ctxAddress: options.address ?? event.pageFault!.gva,
            ctxSize: data.length,
            ctxData: data,
          }),
        }),
      );
    }
    this.raw(encodeMessage(MessageId.EVENT_REPLY, event.seq, ...parts));
  }

  async enable(vcpu: number, event: number, enable = true): Promise<Reply> {
    return this.command(
      MessageId.CONTROL_EVENTS,
      vcpuHeader.encode({ vcpu }),
      controlEvents.encode({ event, enable: enable ? 1 : 0 }),
    );
  }

  async singleStep(vcpu: number, enable: boolean): Promise<Reply> {
    return this.command(
      MessageId.VCPU_CONTROL_SINGLESTEP,
      vcpuHeader.encode({ vcpu }),
      controlSingleStep.encode({ enable: enable ? 1 : 0 }),
    );
  }

  async setAccess(...pages: readonly { gpa: bigint; access: number }[]): Promise<Reply> {
    return this.command(
      MessageId.SET_PAGE_ACCESS,
      setPageAccess.encode({ count: pages.length }),
      ...pages.map((page) => pageAccessEntry.encode(page)),
    );
  }

  async read(gpa: bigint, size: bigint): Promise<Reply> {
    return this.command(MessageId.READ_PHYSICAL, readPhysical.encode({ gpa, size }));
  }

  async write(gpa: bigint, data: Uint8Array): Promise<Reply> {
    return this.command(
      MessageId.WRITE_PHYSICAL,
      writePhysical.encode({ gpa, size: BigInt(data.length) }),
      data,
    );
  }

  async registers(vcpu: number, ...msrs: number[]): Promise<ValuesOf<typeof getRegistersReply>> {
    const indices = Buffer.alloc(msrs.length * 4);
    msrs.forEach((msr, i) => {
      indices.writeUInt32LE(msr, i * 4);
    });
    const { data } = await this.command(
      MessageId.GET_REGISTERS,
      vcpuHeader.encode({ vcpu }),
      getRegisters.encode({ msrCount: msrs.length }),
      indices,
    );
    return getRegistersReply.decode(data);
  }

  async setRegisters(vcpu: number, registers: KvmRegs): Promise<Reply> {
    return this.command(MessageId.SET_REGISTERS, vcpuHeader.encode({ vcpu }), kvmRegs.encode(registers));
  }

  /** As libvmi pauses: one batch, of which only the last command is answered. */
  async pauseAll(vcpuCount: number): Promise<Reply> {
    this.post(MessageId.CONTROL_CMD_RESPONSE, controlCmdResponse.encode({ enable: 0, now: 1 }));
    for (let vcpu = 0; vcpu < vcpuCount; vcpu++) {
      this.post(MessageId.PAUSE_VCPU, vcpuHeader.encode({ vcpu }), pauseVcpu.encode({ wait: 1 }));
    }
    return this.command(MessageId.CONTROL_CMD_RESPONSE, controlCmdResponse.encode({ enable: 1, now: 1 }));
  }

  /** Resolves once the hypervisor has closed the connection. */
  async disconnected(): Promise<void> {
    await this.until(() => this.closed);
  }

  /** Closes the connection; the listening socket stays. */
  hangUp(): void {
    this.socket?.destroy();
  }

  close(): void {
    this.hangUp();
    this.server.close();
  }

  private take(bytes: Buffer): void {
    const missing = qemuToIntrospector.size - this.greeting.length;
    this.greeting = Buffer.concat([this.greeting, bytes.subarray(0, Math.max(missing, 0))]);
    for (const message of this.reader.push(bytes.subarray(Math.max(missing, 0)))) this.deliver(message);
    this.notify();
  }

  private deliver(message: Message): void {
    if (message.id === MessageId.EVENT) {
      const common = eventCommon.decode(message.body);
      this.received.push(`event ${common.event} vcpu ${common.vcpu}`);
      this.events.push({
        seq: message.seq,
        vcpu: common.vcpu,
        event: common.event,
        common,
        ...(common.event === EventId.PF && {
          pageFault: pageFaultEvent.decode(message.body, common.size),
        }),
      });
      return;
    }
    this.received.push(`reply ${message.id}`);
    const { error } = errorCode.decode(message.body);
    this.replies.get(message.seq)?.({ error, data: message.body.subarray(errorCode.size) });
    this.replies.delete(message.seq);
  }

  private notify(): void {
    for (const waiter of this.waiters.splice(0)) waiter();
  }

  private async until(condition: () => boolean): Promise<void> {
    while (!condition()) await new Promise<void>((resolve) => this.waiters.push(resolve));
  }
}

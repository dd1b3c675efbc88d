// A scripted hypervisor: the other end of the KVMI socket, in a thread of its own because the session under test
// blocks its thread. It runs no guest; tests tell it which events to raise. It is written from the protocol alone
// and imports nothing of this project, so that the two sides cannot agree on a mistake.
import { connect, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { type MessagePort, workerData } from 'node:worker_threads';

const HANDSHAKE_SIZE = 96;
const HANDSHAKE_ANSWER_SIZE = 24;
const HEADER_SIZE = 8;
const EVENT_SIZE = 544;
const REGS_SIZE = 144;
const SREGS_SIZE = 312;
const PAGE_SIZE = 4096;
const RETRY_MS = 5;
const PATIENCE_MS = 10_000;

const EVENT_REPLY = 0;
const EVENT = 1;
const GET_VERSION = 2;
const GET_GUEST_INFO = 5;
const PAUSE_VCPU = 7;
const CONTROL_EVENTS = 9;
const GET_REGISTERS = 13;
const SET_REGISTERS = 14;
const READ_PHYSICAL = 17;
const WRITE_PHYSICAL = 18;
const SET_PAGE_ACCESS = 21;
const CONTROL_CMD_RESPONSE = 27;
const GET_MAX_GFN = 29;
const CONTROL_SINGLESTEP = 63;

const PF_EVENT = 6;
const PAUSE_EVENT = 10;

const EINVAL = -22;
const EOPNOTSUPP = -95;

export interface PeerOptions {
  readonly socket: string;
  readonly vcpus: number;
  readonly frames: number;
}

export interface PageFault {
  readonly vcpu: number;
  readonly gva: bigint;
  readonly gpa: bigint;
  /** Bits: 1 read, 2 write, 4 execute. */
  readonly access: number;
  readonly rip?: bigint;
}

/** An answer to an event, as it came over the wire. */
export interface EventAnswer {
  readonly vcpu: number;
  readonly event: number;
  readonly action: number;
  readonly dataAddress: bigint;
  readonly data: Uint8Array;
}

/** What to do when a message of this id arrives next, before it is carried out. */
export interface Trap {
  readonly command: number;
  readonly vcpu?: number;
  /** Ends the connection; reads and answers nothing from here on; answers with an error; raises an event. */
  readonly action: 'die' | 'ignore' | 'refuse' | PageFault;
}

interface Vcpu {
  /** Offsets of KVM's own structures. */
  readonly regs: Buffer;
  readonly sregs: Buffer;
  readonly msrs: Map<number, bigint>;
  outstanding: { seq: number; event: number } | undefined;
  pendingPauses: number;
}

const { options, control, signal } = workerData as {
  options: PeerOptions;
  control: MessagePort;
  signal: Int32Array;
};
const memory = Buffer.alloc(options.frames * PAGE_SIZE);
const access = new Map<number, number>();
const vcpus: Vcpu[] = Array.from({ length: options.vcpus }, longModeVcpu);
const commands: number[] = [];
const faultAnswers: EventAnswer[] = [];
const traps: Trap[] = [];
const waiters: { met: () => boolean; done: () => void }[] = [];
let socket: Socket | undefined;
let connections = 0;
let replying = true;
let ignoring = false;
/** A vCPU that is told to pause and never reports that it has. */
let restless: number | undefined;
let seq = 1000;
let stopped = false;

function longModeVcpu(): Vcpu {
  const sregs = Buffer.alloc(SREGS_SIZE);
  sregs.writeBigUInt64LE(0x8005_0033n, 224); // CR0: paging on
  sregs.writeBigUInt64LE(0x6f8n, 248); // CR4: PAE
  sregs.writeBigUInt64LE(0xd01n, 264); // EFER: long mode
  const msrs = new Map([[0xc000_0080, 0xd01n]]);
  return { regs: Buffer.alloc(REGS_SIZE), sregs, msrs, outstanding: undefined, pendingPauses: 0 };
}

function progress(): void {
  for (const waiter of waiters.splice(0)) {
    if (waiter.met()) waiter.done();
    else waiters.push(waiter);
  }
}

async function until(met: () => boolean): Promise<void> {
  if (met()) return;
  const done = new Promise<void>((done) => waiters.push({ met, done }));
  await Promise.race([
    done,
    sleep(PATIENCE_MS, undefined, { ref: false }).then(() => {
      throw new Error('the peer waited in vain');
    }),
  ]);
}

/** Connects as QEMU does: tries until somebody listens. */
async function stayConnected(again: boolean): Promise<void> {
  do {
    await attempt();
    await sleep(RETRY_MS);
  } while (!stopped && (again || connections === 0));
}

function attempt(): Promise<void> {
  return new Promise((ended) => {
    const candidate = connect(options.socket);
    let incoming = Buffer.alloc(0);
    let greeted = false;
    candidate.on('error', () => {});
    candidate.on('close', () => {
      if (socket === candidate) socket = undefined;
      progress();
      ended();
    });
    candidate.on('connect', () => {
      const handshake = Buffer.alloc(HANDSHAKE_SIZE);
      handshake.writeUInt32LE(HANDSHAKE_SIZE, 0);
      candidate.write(handshake);
    });
    candidate.on('data', (chunk) => {
      incoming = Buffer.concat([incoming, chunk]);
      if (!greeted) {
        if (incoming.length < HANDSHAKE_ANSWER_SIZE) return;
        incoming = incoming.subarray(HANDSHAKE_ANSWER_SIZE);
        greeted = true;
        connections++;
        socket = candidate;
        replying = true;
      }
      while (incoming.length >= HEADER_SIZE) {
        const size = HEADER_SIZE + incoming.readUInt16LE(2);
        if (incoming.length < size) break;
        const message = incoming.subarray(0, size);
        incoming = incoming.subarray(size);
        receive(message.readUInt16LE(0), message.readUInt32LE(4), message.subarray(HEADER_SIZE));
      }
      progress();
    });
  });
}

function send(id: number, sequence: number, body: Buffer): void {
  const header = Buffer.alloc(HEADER_SIZE);
  header.writeUInt16LE(id, 0);
  header.writeUInt16LE(body.length, 2);
  header.writeUInt32LE(sequence, 4);
  // One message is one write: libkvmi loses its place in a message that arrives in two parts.
  socket?.write(Buffer.concat([header, body]));
}

function receive(id: number, sequence: number, body: Buffer): void {
  if (ignoring) return;
  if (id !== EVENT_REPLY) commands.push(id);
  const trapped = traps.findIndex(
    (trap) => trap.command === id && (trap.vcpu === undefined || trap.vcpu === body.readUInt16LE(0)),
  );
  const action = trapped >= 0 ? traps.splice(trapped, 1)[0]!.action : undefined;
  if (action === 'die') {
    socket?.destroy();
    return;
  }
  if (action === 'ignore') {
    ignoring = true;
    return;
  }
  if (action !== undefined && action !== 'refuse') raiseFault(action);
  if (id === EVENT_REPLY) {
    receiveAnswer(body);
    return;
  }
  const result = action === 'refuse' ? EINVAL : perform(id, body);
  if (!replying) {
    // The command that switches replies back on is itself answered.
    if (id !== CONTROL_CMD_RESPONSE) return;
    replying = body[0] === 1;
    if (!replying) return;
  } else if (id === CONTROL_CMD_RESPONSE) {
    replying = body[0] === 1;
    if (!replying) return;
  }
  const error = Buffer.alloc(8);
  if (typeof result === 'number') error.writeInt32LE(result, 0);
  send(id, sequence, typeof result === 'number' ? error : Buffer.concat([error, result]));
}

function perform(id: number, body: Buffer): Buffer | number {
  switch (id) {
    case GET_VERSION: {
      const reply = Buffer.alloc(16);
      reply.writeUInt32LE(1, 0);
      return reply;
    }
    case GET_GUEST_INFO: {
      const reply = Buffer.alloc(16);
      reply.writeUInt32LE(vcpus.length, 0);
      return reply;
    }
    case GET_MAX_GFN: {
      const reply = Buffer.alloc(8);
      reply.writeBigUInt64LE(BigInt(options.frames), 0);
      return reply;
    }
    case READ_PHYSICAL: {
      const [start, end] = range(body);
      return end > memory.length ? EINVAL : Buffer.from(memory.subarray(start, end));
    }
    case WRITE_PHYSICAL: {
      const [start, end] = range(body);
      if (end > memory.length) return EINVAL;
      memory.set(body.subarray(16, 16 + end - start), start);
      return Buffer.alloc(0);
    }
    case SET_PAGE_ACCESS:
      for (let entry = 8, count = body.readUInt16LE(2); count > 0; count--, entry += 16) {
        access.set(Number(body.readBigUInt64LE(entry) / BigInt(PAGE_SIZE)), body[entry + 8]!);
      }
      return Buffer.alloc(0);
    case GET_REGISTERS:
      return registersReply(body);
    case SET_REGISTERS: {
      const vcpu = vcpus[body.readUInt16LE(0)];
      if (vcpu === undefined) return EINVAL;
      vcpu.regs.set(body.subarray(8, 8 + REGS_SIZE));
      return Buffer.alloc(0);
    }
    case PAUSE_VCPU: {
      const index = body.readUInt16LE(0);
      const vcpu = vcpus[index];
      if (vcpu === undefined) return EINVAL;
      vcpu.pendingPauses++;
      reportPause(index);
      return Buffer.alloc(0);
    }
    case CONTROL_EVENTS:
    case CONTROL_SINGLESTEP:
    case CONTROL_CMD_RESPONSE:
      return Buffer.alloc(0);
    default:
      return EOPNOTSUPP;
  }
}

function range(body: Buffer): [start: number, end: number] {
  const start = Number(body.readBigUInt64LE(0));
  return [start, start + Number(body.readBigUInt64LE(8))];
}

function registersReply(body: Buffer): Buffer | number {
  const vcpu = vcpus[body.readUInt16LE(0)];
  if (vcpu === undefined) return EINVAL;
  const count = body.readUInt16LE(8);
  const mode = Buffer.alloc(8);
  mode.writeUInt32LE(8, 0);
  const msrs = Buffer.alloc(8 + count * 16);
  msrs.writeUInt32LE(count, 0);
  for (let index = 0; index < count; index++) {
    const number = body.readUInt32LE(16 + index * 4);
    msrs.writeUInt32LE(number, 8 + index * 16);
    msrs.writeBigUInt64LE(vcpu.msrs.get(number) ?? 0n, 16 + index * 16);
  }
  return Buffer.concat([mode, vcpu.regs, vcpu.sregs, msrs]);
}

function raise(index: number, event: number, specific: Buffer): void {
  const vcpu = vcpus[index]!;
  if (vcpu.outstanding !== undefined) throw new Error(`vCPU ${index} has an unanswered event`);
  const common = Buffer.alloc(EVENT_SIZE);
  common.writeUInt16LE(EVENT_SIZE, 0);
  common.writeUInt16LE(index, 2);
  common[4] = event;
  common[8] = 8;
  common.set(vcpu.regs, 16);
  common.set(vcpu.sregs, 160);
  seq++;
  vcpu.outstanding = { seq, event };
  send(EVENT, seq, Buffer.concat([common, specific]));
}

function raiseFault({ vcpu, gva, gpa, access: bits, rip }: PageFault): void {
  if (rip !== undefined) vcpus[vcpu]!.regs.writeBigUInt64LE(rip, 128);
  const specific = Buffer.alloc(24);
  specific.writeBigUInt64LE(gva, 0);
  specific.writeBigUInt64LE(gpa, 8);
  specific[16] = bits;
  raise(vcpu, PF_EVENT, specific);
}

function reportPause(index: number): void {
  const vcpu = vcpus[index]!;
  if (index === restless || vcpu.outstanding !== undefined || vcpu.pendingPauses === 0) return;
  vcpu.pendingPauses--;
  raise(index, PAUSE_EVENT, Buffer.alloc(0));
}

function receiveAnswer(body: Buffer): void {
  const index = body.readUInt16LE(0);
  const vcpu = vcpus[index]!;
  const event = body[9]!;
  if (vcpu.outstanding?.event !== event) throw new Error(`vCPU ${index} got a second answer`);
  vcpu.outstanding = undefined;
  if (event === PF_EVENT) {
    faultAnswers.push({
      vcpu: index,
      event,
      action: body[8]!,
      dataAddress: body.readBigUInt64LE(16),
      data: new Uint8Array(body.subarray(32, 32 + body.readUInt32LE(24))),
    });
  }
  reportPause(index);
}

const operations = {
  fault: (fault: PageFault) => raiseFault(fault),
  /** An event as it stands, of a kind and with a body that nobody expects. */
  event: (vcpu: number, event: number, specific: Uint8Array) => raise(vcpu, event, Buffer.from(specific)),
  onCommand: (trap: Trap) => void traps.push(trap),
  neverPauses: (vcpu: number) => {
    restless = vcpu;
  },
  setMemory: (gpa: number, bytes: Uint8Array) => memory.set(bytes, gpa),
  memory: (gpa: number, length: number) => new Uint8Array(memory.subarray(gpa, gpa + length)),
  setRegister: (vcpu: number, offset: number, value: bigint) => {
    vcpus[vcpu]!.regs.writeBigUInt64LE(value, offset);
  },
  register: (vcpu: number, offset: number) => vcpus[vcpu]!.regs.readBigUInt64LE(offset),
  setSystemRegister: (vcpu: number, offset: number, value: bigint) => {
    vcpus[vcpu]!.sregs.writeBigUInt64LE(value, offset);
  },
  setMsr: (vcpu: number, msr: number, value: bigint) => void vcpus[vcpu]!.msrs.set(msr, value),
  access: (gfn: number) => access.get(gfn) ?? 7,
  paused: () => vcpus.map(({ outstanding }) => outstanding?.event === PAUSE_EVENT),
  outstanding: () => vcpus.filter(({ outstanding }) => outstanding !== undefined).length,
  commands: () => commands.splice(0),
  connections: () => connections,
  /** Waits for so many answers to page faults, and takes them. */
  answers: async (count: number): Promise<EventAnswer[]> => {
    await until(() => faultAnswers.length >= count);
    return faultAnswers.splice(0);
  },
  /** Waits for the session's end of the connection. */
  disconnected: () => until(() => connections > 0 && socket === undefined),
  running: () => until(() => vcpus.every(({ outstanding }) => outstanding === undefined)),
  die: () => void socket?.destroy(),
  dieIn: (milliseconds: number) => void setTimeout(() => socket?.destroy(), milliseconds),
  stop: () => {
    stopped = true;
    socket?.destroy();
    control.close();
  },
};

export type Operations = typeof operations;

control.on('message', async ([name, args]: [keyof Operations, unknown[]]) => {
  let answer: { value?: unknown; error?: string };
  try {
    answer = { value: await (operations[name] as (...args: unknown[]) => unknown)(...args) };
  } catch (error) {
    answer = { error: String(error) };
  }
  control.postMessage(answer);
  Atomics.add(signal, 0, 1);
  Atomics.notify(signal, 0);
});
void stayConnected(true);

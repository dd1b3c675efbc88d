// The hypervisor's side of KVMI over the embedded machine: commands in, events and replies out.
import { MemtablesError } from '../errors.js';
import { ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE, type Machine, type Trap } from '../machine/machine.js';
import { type Gfn, type Gva, gfnOf, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import { GPR_NAMES, type Registers } from '../x86/registers.js';
import { EventTimes } from './event-times.js';
import { eventMsrsOf, kvmMode, kvmRegsOf, kvmSregsOf } from './kvmi-registers.js';
import {
  controlCmdResponse,
  controlEvents,
  controlSingleStep,
  EventAction,
  EventId,
  encodeMessage,
  encodeReply,
  errorCode,
  eventCommon,
  eventReply,
  getGuestInfoReply,
  getMaxGfnReply,
  getRegisters,
  getRegistersReply,
  getVersionReply,
  KVMI_VERSION,
  KvmError,
  type KvmRegs,
  kvmRegs,
  MAX_BODY,
  MAX_SUBSTITUTE,
  type Message,
  MessageId,
  MSR_INDEX_SIZE,
  msrEntry,
  PageAccess,
  type PageFaultReply,
  pageAccessEntry,
  pageFaultEvent,
  pageFaultReply,
  pauseVcpu,
  readPhysical,
  setPageAccess,
  singleStepEvent,
  vcpuHeader,
  writePhysical,
} from './kvmi-wire.js';
import type { Fields, Layout, Values } from './layout.js';

/** How a violation ended: completed on memory, completed with the tool's bytes, or run again. */
export type Outcome = 'memory' | 'substituted' | 'retried';

/** Told about what the introspection does to the guest. */
export interface IntrospectionObserver {
  /** A violation has become an event. */
  raised(trap: Trap): void;
  /** It is about to be carried out, or given up. */
  answered(trap: Trap, outcome: Outcome): void;
  /** The tool has written guest memory. */
  written(): void;
}

interface OpenEvent {
  readonly seq: number;
  readonly event: number;
  /** What the machine stopped at; a PAUSE event, and a step that ends a page fault, have none. */
  readonly trap?: Trap;
}

interface Vcpu {
  readonly index: number;
  readonly enabled: Set<number>;
  /** The one event the tool has not answered yet; the vCPU stands still until it has. */
  open: OpenEvent | undefined;
  /** PAUSE events that are still to be sent. */
  pausesDue: number;
  /** A SINGLESTEP event is due once the trapped instruction is through. */
  stepDue: boolean;
  /** What SET_REGISTERS asked for; it takes effect when the open event is answered. */
  delayed: KvmRegs | undefined;
}

/** KVM's bound on the pauses one vCPU can owe. */
const MAX_PAUSES_DUE = 1001;

const INTERCEPTED: ReadonlySet<number> = new Set([
  // Accepted because libvmi enables them at attach; without CONTROL_CR and CONTROL_MSR none is ever raised.
  EventId.CR,
  EventId.MSR,
  EventId.PF,
  EventId.SINGLESTEP,
]);
const KNOWN_EVENTS: ReadonlySet<number> = new Set(Object.values(EventId));

const ACCESS_BIT: Readonly<Record<Trap['access'], number>> = {
  read: ACCESS_READ,
  write: ACCESS_WRITE,
  execute: ACCESS_EXECUTE,
};

/** Thrown by a command's handler: the error its reply carries. */
class Refusal extends Error {
  constructor(readonly error: number) {
    super(`refused with error ${error}`);
  }
}

type Handler = (body: Buffer) => readonly Uint8Array[];

/**
 * Carries out what an introspection tool asks of the machine, with KVM's rules: at most one outstanding event
 * a vCPU, commands are answered meanwhile, pauses are counted, and everything is undone at `detach`.
 *
 * It never blocks and knows no socket: `receive` takes the tool's messages, `send` gets whole messages.
 */
export class Introspection {
  private send: ((message: Buffer) => void) | undefined;
  private repliesEnabled = true;
  private nextSeq = 1;
  private readonly vcpus: readonly Vcpu[];
  private readonly restricted = new Set<Gfn>();
  readonly times: EventTimes;

  constructor(
    private readonly machine: Machine,
    private readonly observer: IntrospectionObserver,
  ) {
    this.times = new EventTimes(machine.vcpuCount);
    this.vcpus = Array.from({ length: machine.vcpuCount }, (_, index) => ({
      index,
      enabled: new Set<number>(),
      open: undefined,
      pausesDue: 0,
      stepDue: false,
      delayed: undefined,
    }));
  }

  get attached(): boolean {
    return this.send !== undefined;
  }

  /** True when no vCPU can run before the tool has answered. */
  get blocked(): boolean {
    return this.vcpus.every((vcpu) => vcpu.open !== undefined);
  }

  /** How many events the tool has not answered, pauses among them. */
  get outstanding(): number {
    return this.vcpus.filter((vcpu) => vcpu.open !== undefined).length;
  }

  /** Which vCPUs stand in a PAUSE event. */
  get paused(): readonly boolean[] {
    return this.vcpus.map((vcpu) => vcpu.open?.event === EventId.PAUSE_VCPU);
  }

  /** Frames whose permissions the tool has taken away. */
  get restrictedFrames(): number {
    return this.restricted.size;
  }

  /** A tool has connected. `send` is called once per message, with the whole message. */
  attach(send: (message: Buffer) => void): void {
    this.send = send;
    this.repliesEnabled = true;
  }

  /** The tool is gone: gives every permission back, answers what is outstanding and resumes every vCPU. */
  detach(): void {
    this.send = undefined;
    for (const gfn of this.restricted) this.machine.setAccess(gfn, PageAccess.ALL);
    this.restricted.clear();
    for (const vcpu of this.vcpus) {
      const open = vcpu.open;
      vcpu.open = undefined;
      vcpu.pausesDue = 0;
      vcpu.stepDue = false;
      vcpu.delayed = undefined;
      vcpu.enabled.clear();
      this.times.interrupted(vcpu.index);
      this.machine.setSingleStep(vcpu.index, false);
      if (open?.event === EventId.PF && open.trap) this.observer.answered(open.trap, 'memory');
      if (open?.trap) this.machine.complete(vcpu.index);
      else if (open) this.machine.resume(vcpu.index);
    }
  }

  /** Turns what the machine stopped at into events. */
  trapped(traps: readonly Trap[]): void {
    for (const trap of traps) this.raiseTrap(this.vcpus[trap.vcpu]!, trap);
  }

  /**
   * Carries out one message of the tool.
   * @throws MemtablesError `PROTOCOL_VIOLATION` when the connection has to be dropped
   */
  receive(message: Message): void {
    if (message.id === MessageId.EVENT_REPLY) {
      this.answer(message);
      return;
    }
    if (message.id === MessageId.CONTROL_CMD_RESPONSE) {
      this.controlReplies(message);
      return;
    }
    const handler = this.commands.get(message.id);
    if (!handler) {
      // Sent even while replies are off: the tool has to learn of it.
      this.transmit(encodeReply(message, KvmError.EOPNOTSUPP));
      return;
    }
    try {
      this.reply(message, KvmError.NONE, handler(message.body));
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      this.reply(message, error.error);
    }
  }

  private readonly commands: ReadonlyMap<number, Handler> = new Map<number, Handler>([
    [MessageId.GET_VERSION, () => [getVersionReply.encode({ version: KVMI_VERSION })]],
    [MessageId.GET_GUEST_INFO, () => [getGuestInfoReply.encode({ vcpuCount: this.vcpus.length })]],
    [MessageId.GET_MAX_GFN, () => [getMaxGfnReply.encode({ gfn: this.frameCount })]],
    [MessageId.READ_PHYSICAL, (body) => this.readPhysical(body)],
    [MessageId.WRITE_PHYSICAL, (body) => this.writePhysical(body)],
    [MessageId.SET_PAGE_ACCESS, (body) => this.setPageAccess(body)],
    [MessageId.PAUSE_VCPU, (body) => this.pauseVcpu(body)],
    [MessageId.CONTROL_EVENTS, (body) => this.controlEvents(body)],
    [MessageId.VCPU_CONTROL_SINGLESTEP, (body) => this.controlSingleStep(body)],
    [MessageId.GET_REGISTERS, (body) => this.getRegisters(body)],
    [MessageId.SET_REGISTERS, (body) => this.setRegisters(body)],
  ]);

  private get frameCount(): bigint {
    return BigInt(this.machine.memoryBytes / PAGE_SIZE);
  }

  // Commands

  private controlReplies(message: Message): void {
    const { enable, now } = controlCmdResponse.decode(message.body);
    if (!controlCmdResponse.paddingIsZero(message.body)) {
      this.reply(message, KvmError.EINVAL);
      return;
    }
    if (now === 1) this.repliesEnabled = enable === 1;
    this.reply(message, KvmError.NONE);
    this.repliesEnabled = enable === 1;
  }

  private readPhysical(body: Buffer): Uint8Array[] {
    const { gpa, size } = readPhysical.decode(body);
    return [this.machine.readPhysical(gpa, this.lengthInsidePage(gpa, size))];
  }

  private writePhysical(body: Buffer): [] {
    const { gpa, size } = writePhysical.decode(body);
    const length = this.lengthInsidePage(gpa, size);
    const data = body.subarray(writePhysical.size, writePhysical.size + length);
    if (data.length < length) throw violation('a write carries fewer bytes than it announces', { gpa, size });
    this.machine.writePhysical(gpa, data);
    this.observer.written();
    return [];
  }

  private lengthInsidePage(gpa: bigint, size: bigint): number {
    if (size === 0n || BigInt(pageOffset(gpa)) + size > BigInt(PAGE_SIZE)) throw new Refusal(KvmError.EINVAL);
    if (gfnOf(gpa) >= this.frameCount) throw new Refusal(KvmError.ENOENT);
    return Number(size);
  }

  private setPageAccess(body: Buffer): [] {
    const { view, count } = decodeChecked(setPageAccess, body);
    const end = setPageAccess.size + count * pageAccessEntry.size;
    if (body.length < end) throw violation('a page access list is shorter than it announces', { count });
    if (view !== 0) throw new Refusal(KvmError.EOPNOTSUPP);
    // KVM carries out every valid entry and reports the first error.
    let failed: Refusal | undefined;
    for (let at = setPageAccess.size; at < end; at += pageAccessEntry.size) {
      const { gpa, access } = pageAccessEntry.decode(body, at);
      const valid = (access & ~PageAccess.ALL) === 0 && pageAccessEntry.paddingIsZero(body, at);
      if (valid && gfnOf(gpa) < this.frameCount) this.restrict(gfnOf(gpa), access);
      else failed ??= new Refusal(valid ? KvmError.ENOENT : KvmError.EINVAL);
    }
    if (failed) throw failed;
    return [];
  }

  private restrict(gfn: Gfn, access: number): void {
    this.machine.setAccess(gfn, access);
    if (access === PageAccess.ALL) this.restricted.delete(gfn);
    else this.restricted.add(gfn);
  }

  private pauseVcpu(body: Buffer): [] {
    const vcpu = this.vcpuOf(body);
    decodeChecked(pauseVcpu, body, vcpuHeader.size);
    if (vcpu.pausesDue >= MAX_PAUSES_DUE) throw new Refusal(KvmError.EBUSY);
    vcpu.pausesDue++;
    this.settle(vcpu);
    return [];
  }

  private controlEvents(body: Buffer): [] {
    const vcpu = this.vcpuOf(body);
    const { event, enable } = decodeChecked(controlEvents, body, vcpuHeader.size);
    if (!KNOWN_EVENTS.has(event)) throw new Refusal(KvmError.EINVAL);
    if (!INTERCEPTED.has(event)) throw new Refusal(KvmError.EOPNOTSUPP);
    if (enable === 1) vcpu.enabled.add(event);
    else vcpu.enabled.delete(event);
    return [];
  }

  private controlSingleStep(body: Buffer): [] {
    const vcpu = this.vcpuOf(body);
    const { enable } = decodeChecked(controlSingleStep, body, vcpuHeader.size);
    this.machine.setSingleStep(vcpu.index, enable === 1);
    return [];
  }

  private getRegisters(body: Buffer): Uint8Array[] {
    const vcpu = this.vcpuOf(body);
    const { msrCount } = decodeChecked(getRegisters, body, vcpuHeader.size);
    const first = vcpuHeader.size + getRegisters.size;
    if (body.length < first + msrCount * MSR_INDEX_SIZE) {
      throw violation('a list of MSRs is shorter than it announces', { msrCount });
    }
    const size = errorCode.size + getRegistersReply.size + msrCount * msrEntry.size;
    if (size > MAX_BODY) throw new Refusal(KvmError.EINVAL);
    const msrs: Buffer[] = [];
    for (let i = 0; i < msrCount; i++) {
      const index = body.readUInt32LE(first + i * MSR_INDEX_SIZE);
      msrs.push(msrEntry.encode({ index, data: this.readMsr(vcpu, index) }));
    }
    const registers = this.machine.registers(vcpu.index);
    const fixed = getRegistersReply.encode({
      mode: kvmMode(registers),
      regs: kvmRegsOf(registers),
      sregs: kvmSregsOf(registers),
      msrCount,
    });
    return [fixed, ...msrs];
  }

  private readMsr(vcpu: Vcpu, index: number): bigint {
    try {
      return this.machine.readMsr(vcpu.index, index);
    } catch (error) {
      if (error instanceof MemtablesError) throw new Refusal(KvmError.EINVAL);
      throw error;
    }
  }

  private setRegisters(body: Buffer): [] {
    const vcpu = this.vcpuOf(body);
    const registers = kvmRegs.decode(body, vcpuHeader.size);
    // As KVM does, drop it without an error on a vCPU that no event has stopped.
    if (vcpu.open) vcpu.delayed = registers;
    return [];
  }

  private vcpuOf(body: Buffer): Vcpu {
    const { vcpu } = decodeChecked(vcpuHeader, body);
    const found = this.vcpus[vcpu];
    if (!found) throw new Refusal(KvmError.EINVAL);
    return found;
  }

  // Events

  private raiseTrap(vcpu: Vcpu, trap: Trap): void {
    if (trap.kind === 'single-step') {
      if (vcpu.enabled.has(EventId.SINGLESTEP)) this.raiseSingleStep(vcpu, trap);
      else this.machine.complete(vcpu.index);
      return;
    }
    const access = ACCESS_BIT[trap.access];
    // A further piece of an instruction may lie on a page that the tool has released by now: nobody would answer.
    const allowed = (this.machine.access(gfnOf(trap.gpa)) & access) !== 0;
    if (allowed || !vcpu.enabled.has(EventId.PF)) {
      this.machine.complete(vcpu.index);
      return;
    }
    this.observer.raised(trap);
    this.raise(vcpu, EventId.PF, pageFaultEvent.encode({ gva: trap.gva, gpa: trap.gpa, access }), trap);
  }

  private raiseSingleStep(vcpu: Vcpu, trap?: Trap): void {
    this.raise(vcpu, EventId.SINGLESTEP, singleStepEvent.encode({}), trap);
  }

  private raise(vcpu: Vcpu, event: number, specific: Buffer, trap?: Trap): void {
    const seq = this.nextSeq++;
    // A trap holds its vCPU by itself.
    if (!trap) this.machine.pause(vcpu.index);
    vcpu.open = { seq, event, ...(trap && { trap }) };
    const registers = this.machine.registers(vcpu.index);
    const common = eventCommon.encode({
      size: eventCommon.size,
      vcpu: vcpu.index,
      event,
      mode: kvmMode(registers),
      regs: kvmRegsOf(registers),
      sregs: kvmSregsOf(registers),
      msrs: eventMsrsOf(registers),
    });
    const message = encodeMessage(MessageId.EVENT, seq, common, specific);
    if (event === EventId.PF) this.times.sent(vcpu.index);
    else this.times.interrupted(vcpu.index);
    this.transmit(message);
  }

  /** Lets a vCPU without an open event go on, up to the next event it owes. */
  private settle(vcpu: Vcpu): void {
    while (!vcpu.open && (vcpu.stepDue || vcpu.pausesDue > 0)) {
      // An instruction that touches several pages is finished first, event by event, as KVM's emulator does.
      const { trap } = this.machine.step(vcpu.index, 0);
      if (trap) {
        this.raiseTrap(vcpu, trap);
      } else if (vcpu.stepDue) {
        vcpu.stepDue = false;
        if (vcpu.enabled.has(EventId.SINGLESTEP)) this.raiseSingleStep(vcpu);
      } else {
        vcpu.pausesDue--;
        this.raise(vcpu, EventId.PAUSE_VCPU, Buffer.alloc(0));
      }
    }
  }

  private answer(message: Message): void {
    const { body, seq } = message;
    const { vcpu: index } = vcpuHeader.decode(body);
    const { action, event } = eventReply.decode(body, vcpuHeader.size);
    const vcpu = this.vcpus[index];
    const open = vcpu?.open;
    if (!vcpu || !open || open.seq !== seq || open.event !== event) {
      throw violation('an event was answered that is not outstanding', { vcpu: index, event, seq });
    }
    if (action !== EventAction.CONTINUE && !(action === EventAction.RETRY && event === EventId.PF)) {
      throw violation('an event was answered with an action it does not have', { event, action });
    }
    const specific = vcpuHeader.size + eventReply.size;
    const answer = event === EventId.PF ? pageFaultReply.decode(body, specific) : undefined;
    vcpu.open = undefined;
    if (event === EventId.PF) this.times.answered(index);
    if (answer && open.trap) this.answerPageFault(vcpu, open.trap, action, answer);
    else this.endPauseOrStep(vcpu, open);
    this.settle(vcpu);
  }

  private answerPageFault(vcpu: Vcpu, trap: Trap, action: number, answer: PageFaultReply): void {
    vcpu.stepDue ||= answer.singleStep === 1;
    if (action === EventAction.RETRY && answer.singleStep !== 1) {
      this.observer.answered(trap, 'retried');
      this.machine.retry(vcpu.index);
      this.applyDelayed(vcpu);
      return;
    }
    const data = substitute(trap, answer);
    this.observer.answered(trap, data ? 'substituted' : 'memory');
    this.carryOut(vcpu, trap, data);
  }

  private endPauseOrStep(vcpu: Vcpu, open: OpenEvent): void {
    this.applyDelayed(vcpu);
    if (open.trap) this.machine.complete(vcpu.index);
    else this.machine.resume(vcpu.index);
  }

  private applyDelayed(vcpu: Vcpu): void {
    if (vcpu.delayed) this.machine.setRegisters(vcpu.index, vcpu.delayed);
    vcpu.delayed = undefined;
  }

  /** Completes the decoded instruction. Registers that were set meanwhile lose to what it writes itself. */
  private carryOut(vcpu: Vcpu, trap: Trap, data: Uint8Array | undefined): void {
    const delayed = vcpu.delayed;
    if (!delayed) {
      this.machine.complete(vcpu.index, data);
      return;
    }
    const before = this.machine.registers(vcpu.index);
    this.machine.complete(vcpu.index, data);
    const after = this.machine.registers(vcpu.index);
    // A further piece or iteration is to come: the emulator's write-back is too.
    if (after.rip === trap.rip) return;
    const kept: Partial<Registers> = {};
    for (const name of GPR_NAMES) if (after[name] === before[name]) kept[name] = delayed[name];
    this.machine.setRegisters(vcpu.index, kept);
    vcpu.delayed = undefined;
  }

  // Output

  private reply(command: Message, error: number, parts: readonly Uint8Array[] = []): void {
    if (this.repliesEnabled) {
      this.transmit(encodeReply(command, error, ...parts));
    } else if (parts.length > 0) {
      throw violation('a command that returns data was sent while replies are off', { id: command.id });
    }
  }

  private transmit(message: Buffer): void {
    this.send?.(message);
  }
}

/** The tool's bytes from the trap's address on, or `undefined` when they do not cover the whole piece. */
function substitute(trap: Trap, answer: PageFaultReply): Uint8Array | undefined {
  const size = BigInt(Math.min(answer.ctxSize, MAX_SUBSTITUTE));
  const covers = (at: Gva, length: bigint) =>
    answer.ctxAddress <= at && at + length <= answer.ctxAddress + size;
  if (size === 0n || !covers(trap.gva, BigInt(trap.length))) return undefined;
  return answer.ctxData.subarray(Number(trap.gva - answer.ctxAddress), Number(size));
}

/** @throws Refusal EINVAL when padding is not zero, as KVM does */
function decodeChecked<F extends Fields>(layout: Layout<F>, body: Buffer, at = 0): Values<F> {
  const values = layout.decode(body, at);
  if (!layout.paddingIsZero(body, at)) throw new Refusal(KvmError.EINVAL);
  return values;
}

function violation(message: string, context: Record<string, unknown>): MemtablesError {
  return new MemtablesError('PROTOCOL_VIOLATION', message, {
    remedy: 'Check that both ends speak the same version of the protocol.',
    context,
  });
}

import { MemtablesError } from '../errors.js';
import { type Gfn, type Gpa, type Gva, gfnOf, gpaOfFrame, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import type { Registers } from '../x86/registers.js';
import { decodeAccesses, type MemoryAccess, memoryAccesses, pieceOnPage } from './accesses.js';
import { ACCESS_EXECUTE, ACCESS_READ, type Machine, type MachineOptions, type Trap } from './machine.js';
import { loadAddon, type NativeMachine } from './native.js';
import { fromRegisterFile, REGISTER_COUNT, toRegisterFile } from './register-file.js';
import {
  type NativeReport,
  REPORT_DENIED,
  REPORT_GUEST_FAULT,
  REPORT_SINGLE_STEP,
  ReportBlock,
} from './report-block.js';

/** A trapped instruction, from its first denied piece until it has retired. */
interface OpenInstruction {
  readonly code: Buffer;
  readonly rip: Gva;
  readonly accesses: readonly MemoryAccess[];
  /** What `complete` answers next. */
  trap: Trap;
  /** Further pieces on the page that was denied; the engine does not tell them apart. */
  rest: Trap[];
}

const KINDS = { 1: 'read', 2: 'write', 4: 'execute' } as const;
type AccessBit = keyof typeof KINDS;
const BITS = { read: 1, write: 2, execute: 4 } as const;

const MICROSECONDS_PER_MILLISECOND = 1000;

/** A machine with all its vCPUs halted at address 0 in long mode, paging off, all frames accessible. */
export function createMachine(options: MachineOptions): Machine {
  const { NativeMachine } = loadAddon();
  return new EmbeddedMachine(
    guarded(() => new NativeMachine(options.vcpus, options.memoryBytes)),
    options,
  );
}

class EmbeddedMachine implements Machine {
  readonly vcpuCount: number;
  readonly memoryBytes: number;
  readonly #native: NativeMachine;
  readonly #open: (OpenInstruction | undefined)[];
  /** Traps that `complete` came upon; the next `run` or `step` delivers them. */
  readonly #undelivered: (Trap | undefined)[];
  readonly #block = new ReportBlock();
  #closed = false;

  constructor(native: NativeMachine, options: MachineOptions) {
    this.#native = native;
    this.vcpuCount = options.vcpus;
    this.memoryBytes = options.memoryBytes;
    this.#open = Array.from({ length: options.vcpus });
    this.#undelivered = Array.from({ length: options.vcpus });
  }

  readPhysical(gpa: Gpa, length: number): Buffer {
    return this.#call((native) => native.readPhysical(gpa, length));
  }

  writePhysical(gpa: Gpa, bytes: Uint8Array): void {
    this.#call((native) => native.writePhysical(gpa, bytes));
  }

  setAccess(gfn: Gfn, access: number): void {
    this.#call((native) => native.setAccess(gfn, access));
  }

  access(gfn: Gfn): number {
    return this.#call((native) => native.access(gfn));
  }

  registers(vcpu: number): Registers {
    const file = new BigUint64Array(REGISTER_COUNT);
    this.#call((native) => native.registers(vcpu, file));
    return fromRegisterFile(file);
  }

  setRegisters(vcpu: number, registers: Partial<Registers>): void {
    const { file, set } = toRegisterFile(registers);
    this.#call((native) => native.setRegisters(vcpu, file, set));
  }

  readMsr(vcpu: number, index: number): bigint {
    return this.#call((native) => native.readMsr(vcpu, index));
  }

  pause(vcpu: number): void {
    this.#call((native) => native.pause(vcpu));
  }

  resume(vcpu: number): void {
    this.#call((native) => native.resume(vcpu));
  }

  setSingleStep(vcpu: number, enabled: boolean): void {
    this.#call((native) => native.setSingleStep(vcpu, enabled));
  }

  raiseInterrupt(vcpu: number, vector: number): void {
    this.#call((native) => native.raiseInterrupt(vcpu, vector));
  }

  setTimer(vector: number, microseconds: number): void {
    this.#call((native) => native.setTimer(vector, microseconds));
  }

  complete(vcpu: number, data?: Uint8Array): void {
    const open = this.#delivered(vcpu);
    const { trap } = open;
    if (trap.kind === 'violation') {
      const covers = data !== undefined && trap.access === 'read' && data.length >= trap.length;
      const bytes = covers ? data.subarray(0, trap.length) : undefined;
      this.#call((native) => native.answer(vcpu, trap.gva, gfnOf(trap.gpa), BITS[trap.access], bytes));
      const next = open.rest.shift();
      if (next !== undefined) {
        open.trap = next;
        this.#undelivered[vcpu] = next;
        return;
      }
    }
    this.#call((native) => native.complete(vcpu, open.code, this.#block.words));
    const report = this.#block.read();
    if (report?.kind === REPORT_DENIED) {
      this.#undelivered[vcpu] = this.#denied(report, open);
      return;
    }
    this.#open[vcpu] = undefined;
    if (report !== undefined) this.#undelivered[vcpu] = this.#trapOf(report);
  }

  retry(vcpu: number): void {
    this.#delivered(vcpu);
    this.#open[vcpu] = undefined;
    this.#call((native) => native.retry(vcpu));
  }

  run(microseconds: number, untilInput = false): { readonly traps: readonly Trap[]; readonly idle: boolean } {
    const started = performance.now();
    let left = microseconds;
    do {
      const traps = this.#takeUndelivered();
      if (traps.length > 0) return { traps, idle: false };
      const idle = this.#call((native) => native.run(left, untilInput, this.#block.words));
      const report = this.#block.read();
      if (report === undefined) return { traps: [], idle };
      const trap = this.#trapOf(report);
      if (trap !== undefined) return { traps: [trap], idle: false };
      left = Math.floor(microseconds - (performance.now() - started) * MICROSECONDS_PER_MILLISECOND);
    } while (left >= 0);
    return { traps: [], idle: false };
  }

  step(vcpu: number, instructions: number): { readonly retired: number; readonly trap?: Trap } {
    const undelivered = this.#undelivered[vcpu];
    if (undelivered !== undefined) {
      this.#undelivered[vcpu] = undefined;
      return { retired: 0, trap: undelivered };
    }
    let retired = 0;
    for (;;) {
      retired += this.#call((native) => native.step(vcpu, instructions - retired, this.#block.words));
      const report = this.#block.read();
      if (report === undefined) return { retired };
      const trap = this.#trapOf(report);
      if (trap !== undefined) return { retired, trap };
    }
  }

  takeConsole(): string {
    return this.#call((native) => native.takeConsole()).toString('latin1');
  }

  close(): void {
    this.#closed = true;
    this.#native.close();
  }

  #takeUndelivered(): Trap[] {
    const traps = this.#undelivered.filter((trap) => trap !== undefined);
    this.#undelivered.fill(undefined);
    return traps;
  }

  #delivered(vcpu: number): OpenInstruction {
    const open = this.#open[vcpu];
    if (open !== undefined && this.#undelivered[vcpu] === undefined) return open;
    throw new MemtablesError('INVALID_ARGUMENT', `vCPU ${vcpu} has no trap to complete`, {
      remedy: 'Complete each trap that run or step returned, once.',
      context: { vcpu },
    });
  }

  /** The trap that a report stands for; the guest's own page faults are dealt with here. */
  #trapOf(report: NativeReport): Trap | undefined {
    const { vcpu, registers } = report;
    const decoded = decodeAccesses(report.code);
    const code = report.code.subarray(0, decoded.length);
    const open: OpenInstruction = {
      code,
      rip: registers.rip,
      accesses: memoryAccesses(decoded, registers),
      trap: {
        vcpu,
        kind: 'single-step',
        rip: registers.rip,
        gva: registers.rip,
        gpa: 0n,
        length: 0,
        access: 'execute',
        instruction: code,
      },
      rest: [],
    };
    if (report.kind === REPORT_GUEST_FAULT) {
      const [piece] = this.#piecesOnPage(report, open);
      this.#call((native) => native.raisePageFault(vcpu, piece!.gva, report.errorCode));
      return undefined;
    }
    this.#open[vcpu] = open;
    return report.kind === REPORT_SINGLE_STEP ? open.trap : this.#denied(report, open);
  }

  /** Makes the denied pieces the traps to come, and returns the first. */
  #denied(report: NativeReport, open: OpenInstruction): Trap {
    const [first, ...rest] = this.#piecesOnPage(report, open).map(
      (piece): Trap => ({
        vcpu: report.vcpu,
        kind: 'violation',
        rip: open.rip,
        ...piece,
        gpa: gpaOfFrame(report.frame) + BigInt(pageOffset(piece.gva)),
        access: KINDS[report.access as AccessBit],
        instruction: open.code,
      }),
    );
    open.trap = first!;
    open.rest = rest;
    return first!;
  }

  /** What the instruction does on the reported page in the reported way; at least one piece. */
  #piecesOnPage(report: NativeReport, open: OpenInstruction): { gva: Gva; length: number }[] {
    const accesses: readonly MemoryAccess[] =
      report.access === ACCESS_EXECUTE
        ? [{ gva: open.rip, length: Math.max(open.code.length, 1), read: false, write: false }]
        : open.accesses.filter((access) => (report.access === ACCESS_READ ? access.read : access.write));
    const pieces = accesses
      .map((access) => pieceOnPage(access, report.page))
      .filter((piece) => piece !== undefined);
    // Descriptor tables and save areas are no operands: then it is the page that was touched.
    return pieces.length > 0 ? pieces : [{ gva: report.page, length: PAGE_SIZE }];
  }

  #call<T>(operation: (native: NativeMachine) => T): T {
    if (this.#closed) {
      throw new MemtablesError('INVALID_ARGUMENT', 'the machine is closed', {
        remedy: 'Create another machine.',
      });
    }
    return guarded(
      () => operation(this.#native),
      (vcpu) => this.#describe(vcpu),
    );
  }

  /** Where a vCPU is, for an error's context. */
  #describe(vcpu: number): Record<string, unknown> {
    const file = new BigUint64Array(REGISTER_COUNT);
    this.#native.registers(vcpu, file);
    return { vcpu, registers: fromRegisterFile(file) };
  }
}

/** Turns the addon's errors into ours: a RangeError is about an argument, anything else about the machine. */
function guarded<T>(operation: () => T, describe?: (vcpu: number) => Record<string, unknown>): T {
  try {
    return operation();
  } catch (cause) {
    if (!(cause instanceof Error)) throw cause;
    if (cause instanceof RangeError) {
      throw new MemtablesError('INVALID_ARGUMENT', cause.message, {
        remedy: 'Correct the argument.',
        cause,
      });
    }
    const vcpu = (cause as { vcpu?: number }).vcpu;
    throw new MemtablesError('MACHINE_FAILED', cause.message, {
      remedy: 'Look at the registers in the context; the guest did something that no machine survives.',
      context: vcpu === undefined || describe === undefined ? {} : describe(vcpu),
      cause,
    });
  }
}

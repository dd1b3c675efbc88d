import { MemtablesError } from '../../src/errors.js';
import type { Machine, Trap } from '../../src/machine/machine.js';
import { gfnOf, PAGE_SIZE } from '../../src/vmi/address.js';
import { GPR_NAMES, type Registers } from '../../src/x86/registers.js';

const RWX = 7;
const ACCESS_BITS = { read: 1, write: 2, execute: 4 } as const;

export const MEMORY_PAGES = 16;

/** What a scripted instruction does: one access (or several pieces of one), and registers it changes. */
export interface ScriptedInstruction {
  readonly pieces: readonly Omit<Trap, 'vcpu' | 'kind'>[];
  readonly writes?: Partial<Registers>;
}

interface Cpu {
  registers: Registers;
  program: ScriptedInstruction[];
  /** Pieces of the instruction that is being carried out. */
  pieces: Omit<Trap, 'vcpu' | 'kind'>[];
  current: ScriptedInstruction | undefined;
  open: Trap | undefined;
  pauses: number;
  singleStep: boolean;
  retired: number;
}

/** A machine whose vCPUs run a script; `log` keeps, in order, what was asked of it and what ran. */
export class FakeMachine implements Machine {
  readonly memoryBytes = MEMORY_PAGES * PAGE_SIZE;
  readonly memory = Buffer.alloc(this.memoryBytes);
  readonly log: string[] = [];
  /** How often `run` was called. */
  runs = 0;
  private readonly permissions = new Map<bigint, number>();
  private readonly cpus: Cpu[];

  constructor(readonly vcpuCount = 2) {
    this.cpus = Array.from({ length: vcpuCount }, (_, index) => ({
      registers: startRegisters(index),
      program: [],
      pieces: [],
      current: undefined,
      open: undefined,
      pauses: 0,
      singleStep: false,
      retired: 0,
    }));
  }

  script(vcpu: number, ...instructions: ScriptedInstruction[]): void {
    this.cpus[vcpu]!.program.push(...instructions);
  }

  retired(vcpu: number): number {
    return this.cpus[vcpu]!.retired;
  }

  isPaused(vcpu: number): boolean {
    return this.cpus[vcpu]!.pauses > 0;
  }

  readPhysical(gpa: bigint, length: number): Buffer {
    return Buffer.from(this.memory.subarray(Number(gpa), Number(gpa) + length));
  }

  writePhysical(gpa: bigint, bytes: Uint8Array): void {
    this.memory.set(bytes, Number(gpa));
  }

  setAccess(gfn: bigint, access: number): void {
    this.log.push(`access ${gfn} ${access}`);
    this.permissions.set(gfn, access);
  }

  access(gfn: bigint): number {
    return this.permissions.get(gfn) ?? RWX;
  }

  registers(vcpu: number): Registers {
    return { ...this.cpus[vcpu]!.registers };
  }

  setRegisters(vcpu: number, registers: Partial<Registers>): void {
    this.log.push(`set ${vcpu} ${Object.keys(registers).join(' ')}`);
    Object.assign(this.cpus[vcpu]!.registers, registers);
  }

  readMsr(_vcpu: number, index: number): bigint {
    if (index !== 0xc0000082) {
      throw new MemtablesError('MACHINE_FAILED', 'no such MSR', { remedy: 'None.' });
    }
    return 0xfffff80000001000n;
  }

  pause(vcpu: number): void {
    this.log.push(`pause ${vcpu}`);
    this.cpus[vcpu]!.pauses++;
  }

  resume(vcpu: number): void {
    this.log.push(`resume ${vcpu}`);
    this.cpus[vcpu]!.pauses--;
  }

  complete(vcpu: number, data?: Uint8Array): void {
    const cpu = this.cpus[vcpu]!;
    if (!cpu.open) throw new Error(`vCPU ${vcpu} has no trap to complete`);
    this.log.push(`complete ${vcpu}${data ? ` ${Buffer.from(data).toString('hex')}` : ''}`);
    const wasStep = cpu.open.kind === 'single-step';
    cpu.open = undefined;
    if (!wasStep && cpu.pieces.length === 0) this.retire(cpu);
  }

  retry(vcpu: number): void {
    const cpu = this.cpus[vcpu]!;
    this.log.push(`retry ${vcpu}`);
    cpu.program.unshift(cpu.current!);
    cpu.open = undefined;
    cpu.pieces = [];
  }

  setSingleStep(vcpu: number, enabled: boolean): void {
    this.cpus[vcpu]!.singleStep = enabled;
  }

  raiseInterrupt(): void {}
  setTimer(): void {}

  run(_microseconds = 0): { traps: Trap[]; idle: boolean } {
    this.runs++;
    const traps: Trap[] = [];
    let idle = true;
    this.cpus.forEach((cpu, vcpu) => {
      if (cpu.pauses > 0 || cpu.open) return;
      if (cpu.pieces.length === 0) {
        const next = cpu.program.shift();
        if (!next) return;
        this.log.push(`run ${vcpu}`);
        cpu.current = next;
        cpu.pieces = [...next.pieces];
      }
      idle = false;
      const trap = this.nextPiece(cpu, vcpu) ?? this.stepTrap(cpu, vcpu);
      if (trap) traps.push(trap);
    });
    return { traps, idle };
  }

  step(vcpu: number, instructions: number): { retired: number; trap?: Trap } {
    if (instructions !== 0) throw new Error('the fake machine only finishes instructions');
    const cpu = this.cpus[vcpu]!;
    const trap = cpu.open || cpu.pieces.length === 0 ? undefined : this.nextPiece(cpu, vcpu);
    return { retired: 0, ...(trap && { trap }) };
  }

  takeConsole(): string {
    return '';
  }
  close(): void {}

  private nextPiece(cpu: Cpu, vcpu: number): Trap | undefined {
    for (let piece = cpu.pieces.shift(); piece; piece = cpu.pieces.shift()) {
      if ((this.access(gfnOf(piece.gpa)) & ACCESS_BITS[piece.access]) !== 0) continue;
      cpu.open = { ...piece, vcpu, kind: 'violation' };
      return cpu.open;
    }
    this.retire(cpu);
    return undefined;
  }

  private stepTrap(cpu: Cpu, vcpu: number): Trap | undefined {
    if (!cpu.singleStep) return undefined;
    cpu.open = { ...readOf(0n), vcpu, kind: 'single-step', rip: cpu.registers.rip };
    return cpu.open;
  }

  private retire(cpu: Cpu): void {
    cpu.retired++;
    Object.assign(cpu.registers, cpu.current?.writes, { rip: cpu.registers.rip + 4n });
  }
}

/** A read of `length` bytes at `gpa`, whose linear address is the same with the upper half's bits set. */
export function readOf(gpa: bigint, length = 4): ScriptedInstruction['pieces'][number] {
  return {
    rip: 0xfffff80000000100n,
    gva: 0xfffff80000000000n + gpa,
    gpa,
    length,
    access: 'read',
    instruction: Buffer.from('8b0411', 'hex'), // mov eax, [rcx+rdx]
  };
}

export const load = (gpa: bigint, writes: Partial<Registers> = {}): ScriptedInstruction => ({
  pieces: [readOf(gpa)],
  writes,
});

export const nop: ScriptedInstruction = { pieces: [] };

function startRegisters(index: number): Registers {
  const gprs = Object.fromEntries(GPR_NAMES.map((name, i) => [name, BigInt(0x1000 * (index + 1) + i)]));
  return {
    ...(gprs as Pick<Registers, (typeof GPR_NAMES)[number]>),
    rip: 0xfffff80000000100n,
    rflags: 0x202n,
    cr0: 0x80050033n,
    cr2: 0x1234n,
    cr3: 0x1000n,
    cr4: 0x6f8n,
    efer: 0xd01n,
    lstar: 0xfffff80000001000n,
    fsBase: 0n,
    gsBase: 0xfffff80000002000n,
    shadowGs: 0x7ff000n,
    cs: 0x10n,
    ss: 0x18n,
    trBase: 0xfffff80000003000n,
    idtrBase: 0xfffff80000004000n,
    gdtrBase: 0xfffff80000005000n,
  };
}

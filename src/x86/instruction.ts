import {
  Code,
  ConditionCode,
  Decoder,
  DecoderOptions,
  FlowControl,
  Instruction as IcedInstruction,
  InstructionInfoFactory,
  MemorySizeExt,
  Mnemonic,
  OpAccess,
  OpKind,
  Register,
  RegisterExt,
} from 'iced-x86';
import type { GprName } from './registers.js';
import { GPR_NAMES } from './registers.js';

export { Code, ConditionCode, FlowControl, Mnemonic, Register };

export const MAX_INSTRUCTION_LENGTH = 15;

export interface RegisterOperand {
  readonly kind: 'register';
  readonly register: Register;
  /** Bytes. */
  readonly size: number;
}

export interface MemoryOperand {
  readonly kind: 'memory';
  readonly base: Register;
  readonly index: Register;
  readonly scale: number;
  /** Signed; the absolute address where `base` is RIP. */
  readonly displacement: bigint;
  /** Bytes accessed, 0 where the instruction accesses none (LEA) or a number that varies. */
  readonly size: number;
  /** Bytes of the address: 4 under a 67h prefix. */
  readonly addressSize: number;
  /** True with a base of its own: FS or GS. */
  readonly segmented: boolean;
  readonly reads: boolean;
  readonly writes: boolean;
  /** False for the implicit `[rsi]` and `[rdi]` of string instructions. */
  readonly explicit: boolean;
}

export interface ImmediateOperand {
  readonly kind: 'immediate';
  /** Sign-extended as the instruction does it, then taken as unsigned 64 bits. */
  readonly value: bigint;
}

export interface BranchOperand {
  readonly kind: 'branch';
  readonly target: bigint;
}

export type Operand = RegisterOperand | MemoryOperand | ImmediateOperand | BranchOperand;

/** A decoded instruction, without any tie to the decoder: nothing has to be freed. */
export interface Instruction {
  readonly ip: bigint;
  readonly length: number;
  readonly bytes: Uint8Array;
  readonly code: Code;
  readonly mnemonic: Mnemonic;
  readonly flow: FlowControl;
  readonly condition: ConditionCode;
  readonly operands: readonly Operand[];
  /** Bit n: the instruction may write the general-purpose register whose encoding is n, or a part of it. */
  readonly writtenGprs: number;
  readonly writesFlags: boolean;
}

/** The encoding (0 to 15) of the general-purpose register that `register` is, or is a part of; else -1. */
export function gprIndex(register: Register): number {
  if (register < Register.AL || register > Register.R15) return -1;
  return RegisterExt.fullRegister(register) - Register.RAX;
}

/** @throws RangeError for a register that is no general-purpose one */
export function gprName(register: Register): GprName {
  const name = GPR_NAMES[gprIndex(register)];
  if (name === undefined) throw new RangeError(`${Register[register]} is not a general-purpose register`);
  return name;
}

/** AH, CH, DH, BH: bits 8 to 15 of their register. */
export function isHighByte(register: Register): boolean {
  return register >= Register.AH && register <= Register.BH;
}

/** Decodes instructions of one piece of 64-bit code. Holds wasm memory: call `free` when done. */
export class Disassembler {
  private readonly decoder: Decoder;
  private readonly instruction = new IcedInstruction();
  private readonly infos = new InstructionInfoFactory();

  constructor(
    private readonly bytes: Uint8Array,
    private readonly start: bigint,
  ) {
    this.decoder = new Decoder(64, bytes, DecoderOptions.None);
  }

  /** `undefined` where the bytes are no instruction, or end inside one. */
  at(offset: number): Instruction | undefined {
    if (offset < 0 || offset >= this.bytes.length) return undefined;
    this.decoder.position = offset;
    this.decoder.ip = this.start + BigInt(offset);
    this.decoder.decodeOut(this.instruction);
    if (this.instruction.isInvalid) return undefined;
    const { length } = this.instruction;
    // A copy: `slice` of a Buffer would be none.
    return detach(this.instruction, this.infos, new Uint8Array(this.bytes.subarray(offset, offset + length)));
  }

  free(): void {
    this.decoder.free();
    this.instruction.free();
    this.infos.free();
  }
}

/** Decodes the instruction that `bytes` begin with; `undefined` where there is none. */
export function decodeInstruction(bytes: Uint8Array, ip: bigint): Instruction | undefined {
  const disassembler = new Disassembler(bytes.subarray(0, MAX_INSTRUCTION_LENGTH), ip);
  try {
    return disassembler.at(0);
  } finally {
    disassembler.free();
  }
}

function detach(iced: IcedInstruction, infos: InstructionInfoFactory, bytes: Uint8Array): Instruction {
  const info = infos.info(iced);
  let writtenGprs = 0;
  for (const used of info.usedRegisters()) {
    const index = gprIndex(used.register);
    if (index >= 0 && writes(used.access)) writtenGprs |= 1 << index;
    used.free();
  }
  const operands = Array.from({ length: iced.opCount }, (_, index) =>
    operandOf(iced, index, info.opAccess(index)),
  );
  info.free();
  return {
    ip: iced.ip,
    length: bytes.length,
    bytes,
    code: iced.code,
    mnemonic: iced.mnemonic,
    flow: iced.flowControl,
    condition: iced.conditionCode,
    operands,
    writtenGprs,
    writesFlags: iced.rflagsModified !== 0,
  };
}

function operandOf(iced: IcedInstruction, index: number, access: OpAccess): Operand {
  const kind = iced.opKind(index);
  switch (kind) {
    case OpKind.Register: {
      const register = iced.opRegister(index);
      return { kind: 'register', register, size: RegisterExt.size(register) };
    }
    case OpKind.NearBranch16:
    case OpKind.NearBranch32:
    case OpKind.NearBranch64:
      return { kind: 'branch', target: iced.nearBranchTarget };
    case OpKind.FarBranch16:
    case OpKind.FarBranch32:
      return { kind: 'branch', target: BigInt(iced.farBranch32) };
    case OpKind.Memory: {
      const base = iced.memoryBase;
      return {
        kind: 'memory',
        base,
        index: iced.memoryIndex,
        scale: iced.memoryIndexScale,
        displacement: BigInt.asIntN(64, iced.memoryDisplacement),
        size: access === OpAccess.NoMemAccess ? 0 : MemorySizeExt.size(iced.memorySize),
        addressSize: addressSize(iced),
        segmented: iced.memorySegment === Register.FS || iced.memorySegment === Register.GS,
        reads: reads(access),
        writes: writes(access),
        explicit: true,
      };
    }
    default:
      if (kind >= OpKind.MemorySegSI && kind <= OpKind.MemoryESRDI) {
        return {
          kind: 'memory',
          base: Register.None,
          index: Register.None,
          scale: 1,
          displacement: 0n,
          size: MemorySizeExt.size(iced.memorySize),
          addressSize: 8,
          segmented: false,
          reads: reads(access),
          writes: writes(access),
          explicit: false,
        };
      }
      return { kind: 'immediate', value: BigInt.asUintN(64, iced.immediate(index)) };
  }
}

function addressSize(iced: IcedInstruction): number {
  const register = iced.memoryBase === Register.None ? iced.memoryIndex : iced.memoryBase;
  if (register === Register.None) return iced.memoryDisplSize === 8 ? 8 : 4;
  if (register === Register.RIP) return 8;
  if (register === Register.EIP) return 4;
  return gprIndex(register) >= 0 ? RegisterExt.size(register) : 8;
}

function reads(access: OpAccess): boolean {
  return (
    access === OpAccess.Read ||
    access === OpAccess.CondRead ||
    access === OpAccess.ReadWrite ||
    access === OpAccess.ReadCondWrite
  );
}

function writes(access: OpAccess): boolean {
  return (
    access === OpAccess.Write ||
    access === OpAccess.CondWrite ||
    access === OpAccess.ReadWrite ||
    access === OpAccess.ReadCondWrite
  );
}

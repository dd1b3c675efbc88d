import {
  Code,
  Decoder,
  DecoderOptions,
  FlowControl,
  Instruction,
  InstructionInfoFactory,
  Mnemonic,
  OpAccess,
  OpKind,
  Register,
} from 'iced-x86';
import type { Gva } from '../vmi/address.js';

export const MAX_INSTRUCTION_LENGTH = 15;

/** What matters of an instruction that is to be moved. Offsets count from the function's first byte. */
export interface MovedInstruction {
  /** The offset behind it. */
  readonly end: number;
  /** How it goes on: to the instruction after it, with a call, or anywhere else. */
  readonly flow: 'next' | 'call' | 'branch';
  /** Its memory operand, where that is relative to the instruction pointer. */
  readonly operand: RelativeOperand | undefined;
  /** Interrupts are held off until the instruction after it is done. */
  readonly shadowsNext: boolean;
  readonly changesRsp: boolean;
  /** It accesses memory through a register other than RSP. */
  readonly mayFault: boolean;
}

interface RelativeOperand {
  readonly relativeTo: 'rip' | 'eip';
  readonly address: Gva;
  /** The offset of its 32-bit displacement. */
  readonly displacementAt: number;
}

export interface FunctionSurvey {
  /** The first instructions. */
  readonly moved: readonly MovedInstruction[];
  readonly movedLength: number;
  /** Where the function's instructions branch to, and the addresses that they take by `lea`. */
  readonly targets: readonly Gva[];
}

/**
 * Decodes a whole function and looks closely at its first instructions, as many as begin before `atLeast`.
 * `undefined` when some of the bytes are no instruction.
 */
export function surveyFunction(gva: Gva, bytes: Uint8Array, atLeast: number): FunctionSurvey | undefined {
  const moved: MovedInstruction[] = [];
  const targets: Gva[] = [];
  const decoder = new Decoder(64, bytes, DecoderOptions.None);
  const instruction = new Instruction();
  try {
    decoder.ip = gva;
    while (decoder.canDecode) {
      const start = decoder.position;
      decoder.decodeOut(instruction);
      if (instruction.code === Code.INVALID) return undefined;
      const target = codeAddress(instruction);
      if (target !== undefined) targets.push(target);
      if (start < atLeast) moved.push(examine(decoder, instruction, start));
    }
  } finally {
    instruction.free();
    decoder.free();
  }
  return { moved, movedLength: moved.at(-1)?.end ?? 0, targets };
}

function codeAddress(instruction: Instruction): Gva | undefined {
  if (instruction.opCount === 0) return undefined;
  if (instruction.op0Kind === OpKind.NearBranch64) return instruction.nearBranchTarget;
  const takesAddress = instruction.mnemonic === Mnemonic.Lea && instruction.isIpRelMemoryOperand;
  return takesAddress ? instruction.ipRelMemoryAddress : undefined;
}

function examine(decoder: Decoder, instruction: Instruction, start: number): MovedInstruction {
  return {
    end: decoder.position,
    flow: flowOf(instruction.flowControl),
    operand: relativeOperand(decoder, instruction, start),
    shadowsNext: shadowsNext(instruction),
    ...effects(instruction),
  };
}

function flowOf(flow: FlowControl): MovedInstruction['flow'] {
  if (flow === FlowControl.Next) return 'next';
  return flow === FlowControl.Call || flow === FlowControl.IndirectCall ? 'call' : 'branch';
}

function relativeOperand(
  decoder: Decoder,
  instruction: Instruction,
  start: number,
): RelativeOperand | undefined {
  if (!instruction.isIpRelMemoryOperand) return undefined;
  const offsets = decoder.getConstantOffsets(instruction);
  try {
    return {
      relativeTo: instruction.memoryBase === Register.RIP ? 'rip' : 'eip',
      address: instruction.ipRelMemoryAddress,
      displacementAt: start + offsets.displacementOffset,
    };
  } finally {
    offsets.free();
  }
}

function shadowsNext(instruction: Instruction): boolean {
  return (
    instruction.mnemonic === Mnemonic.Sti ||
    (instruction.opCount > 0 &&
      instruction.op0Kind === OpKind.Register &&
      instruction.op0Register === Register.SS)
  );
}

const WRITES: ReadonlySet<OpAccess> = new Set([
  OpAccess.Write,
  OpAccess.CondWrite,
  OpAccess.ReadWrite,
  OpAccess.ReadCondWrite,
]);
const STACK_POINTERS: ReadonlySet<Register> = new Set([
  Register.RSP,
  Register.ESP,
  Register.SP,
  Register.SPL,
]);

function effects(instruction: Instruction): Pick<MovedInstruction, 'changesRsp' | 'mayFault'> {
  const factory = new InstructionInfoFactory();
  const info = factory.info(instruction);
  const registers = info.usedRegisters();
  const memory = info.usedMemory();
  try {
    return {
      changesRsp: registers.some(
        ({ register, access }) => STACK_POINTERS.has(register) && WRITES.has(access),
      ),
      mayFault: memory.some(
        ({ base, index, access }) =>
          access !== OpAccess.NoMemAccess &&
          (index !== Register.None || ![Register.None, Register.RIP, Register.RSP].includes(base)),
      ),
    };
  } finally {
    for (const used of [...registers, ...memory]) used.free();
    info.free();
    factory.free();
  }
}

import { Decoder, DecoderOptions } from 'iced-x86';
import type { Gva } from '../vmi/address.js';
import {
  Disassembler,
  FlowControl,
  type Instruction,
  type MemoryOperand,
  Mnemonic,
  Register,
} from '../x86/instruction.js';
import { GPR_NAMES } from '../x86/registers.js';

/** What matters of an instruction that is to be moved. Offsets count from the function's first byte. */
export interface MovedInstruction {
  /** The offset behind it. */
  readonly end: number;
  /** How it goes on: to the instruction after it, with a call, back to the caller, or anywhere else. */
  readonly flow: 'next' | 'call' | 'return' | 'branch';
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
  /** Where the function's instructions and switch tables lead to, and the addresses that it takes by `lea`. */
  readonly targets: readonly Gva[];
}

/** A function as it lies in its image. */
export interface FunctionCode {
  readonly gva: Gva;
  /** The whole function, from its first byte to its end in `.pdata`. */
  readonly bytes: Uint8Array;
  /** What the entries of its switch tables count from. */
  readonly imageBase: Gva;
}

/**
 * Decodes a whole function and looks closely at its first instructions: all that begin before `atLeast`. The
 * compiler puts switch tables behind the code, inside the function's bounds: decoding ends at the first one.
 * `undefined` when some of the bytes before it are no instruction.
 */
export function surveyFunction(code: FunctionCode, atLeast: number): FunctionSurvey | undefined {
  const { gva, bytes } = code;
  const moved: MovedInstruction[] = [];
  const targets: Gva[] = [];
  let codeEnd = bytes.length;
  const disassembler = new Disassembler(bytes, gva);
  try {
    for (let offset = 0; offset < codeEnd; ) {
      const instruction = disassembler.at(offset);
      if (instruction === undefined) return undefined;
      if (offset < atLeast) moved.push(examine(instruction, offset));
      targets.push(...codeAddresses(instruction));
      offset += instruction.length;
      const table = tableOffset(code, instruction);
      if (table !== undefined && table >= offset) codeEnd = Math.min(codeEnd, table);
    }
  } finally {
    disassembler.free();
  }
  return {
    moved,
    movedLength: moved.at(-1)?.end ?? 0,
    targets: [...targets, ...entriesFrom(code, codeEnd)],
  };
}

function codeAddresses({ mnemonic, operands }: Instruction): Gva[] {
  return operands.flatMap((operand) => {
    if (operand.kind === 'branch') return [operand.target];
    const taken = mnemonic === Mnemonic.Lea && operand.kind === 'memory' && operand.base === Register.RIP;
    return taken ? [BigInt.asUintN(64, operand.displacement)] : [];
  });
}

/** The offset of the switch table that an instruction loads from; its first entry leads into the function. */
function tableOffset(code: FunctionCode, { operands }: Instruction): number | undefined {
  const source = operands[1];
  if (source?.kind !== 'memory' || source.scale !== TABLE_ENTRY_SIZE || source.size !== TABLE_ENTRY_SIZE) {
    return undefined;
  }
  const offset = Number(code.imageBase + source.displacement - code.gva);
  if (offset < 0 || offset + TABLE_ENTRY_SIZE > code.bytes.length) return undefined;
  const [first] = entriesFrom(code, offset);
  const leadsInside = first !== undefined && first >= code.gva && first < code.gva + BigInt(offset);
  return leadsInside ? offset : undefined;
}

/** What the table entries from `offset` to the end of the function lead to. */
function* entriesFrom({ bytes, imageBase }: FunctionCode, offset: number): Generator<Gva> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = offset; at + TABLE_ENTRY_SIZE <= bytes.length; at += TABLE_ENTRY_SIZE) {
    yield imageBase + BigInt(view.getUint32(at, true));
  }
}

const TABLE_ENTRY_SIZE = 4;
const RSP_BIT = 1 << GPR_NAMES.indexOf('rsp');

function examine(instruction: Instruction, start: number): MovedInstruction {
  const { operands, length, mnemonic, flow, writtenGprs } = instruction;
  const [destination] = operands;
  return {
    end: start + length,
    flow: flowOf(flow),
    operand: relativeOperand(instruction, start),
    shadowsNext:
      mnemonic === Mnemonic.Sti || (destination?.kind === 'register' && destination.register === Register.SS),
    changesRsp: (writtenGprs & RSP_BIT) !== 0,
    mayFault: operands.some((operand) => operand.kind === 'memory' && mayFault(operand)),
  };
}

function flowOf(flow: FlowControl): MovedInstruction['flow'] {
  if (flow === FlowControl.Next) return 'next';
  if (flow === FlowControl.Return) return 'return';
  return flow === FlowControl.Call || flow === FlowControl.IndirectCall ? 'call' : 'branch';
}

function relativeOperand({ operands, bytes }: Instruction, start: number): RelativeOperand | undefined {
  for (const operand of operands) {
    if (operand.kind !== 'memory') continue;
    if (operand.base !== Register.RIP && operand.base !== Register.EIP) continue;
    return {
      relativeTo: operand.base === Register.RIP ? 'rip' : 'eip',
      address: BigInt.asUintN(64, operand.displacement),
      displacementAt: start + displacementOffset(bytes),
    };
  }
  return undefined;
}

function displacementOffset(bytes: Uint8Array): number {
  const decoder = new Decoder(64, bytes, DecoderOptions.None);
  const instruction = decoder.decode();
  const offsets = decoder.getConstantOffsets(instruction);
  const { displacementOffset: offset } = offsets;
  for (const each of [offsets, instruction, decoder]) each.free();
  return offset;
}

function mayFault({ base, index, reads, writes, explicit }: MemoryOperand): boolean {
  const ofFrameOrImage = base === Register.RSP || base === Register.RIP || base === Register.None;
  return (reads || writes) && (!explicit || index !== Register.None || !ofFrameOrImage);
}

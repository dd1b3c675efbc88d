import { type Instruction, type MemoryOperand, Mnemonic } from './instruction.js';

/** How an instruction touches memory, as far as its encoding says. */
export interface MemoryAccess {
  /** Bytes of one access (of one element, under `rep`); `undefined` where that varies. */
  readonly bytes: number | undefined;
  /** For statistics: `8-byte`, or the string instruction (`movs`, `rep lods`). */
  readonly form: string;
}

const PREFIXES: readonly number[] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
const REPEAT_PREFIXES: readonly number[] = [0xf2, 0xf3];

/** The access that a violation with this direction was raised for. */
export function memoryAccess(instruction: Instruction, direction: 'read' | 'write'): MemoryAccess {
  const operand = instruction.operands.find(
    (candidate): candidate is MemoryOperand =>
      candidate.kind === 'memory' && (direction === 'read' ? candidate.reads : candidate.writes),
  );
  // Of implicit accesses (push, call, fxsave) the operands say nothing.
  const bytes = operand === undefined || operand.size === 0 ? undefined : operand.size;
  if (operand !== undefined && !operand.explicit) {
    const name = Mnemonic[instruction.mnemonic]!.toLowerCase().replace(/[bwdq]$/, '');
    return { bytes, form: isRepeated(instruction) ? `rep ${name}` : name };
  }
  return { bytes, form: bytes === undefined ? 'other' : `${bytes}-byte` };
}

function isRepeated({ bytes }: Instruction): boolean {
  const opcode = bytes.findIndex((byte) => !PREFIXES.includes(byte));
  return bytes.subarray(0, opcode).some((byte) => REPEAT_PREFIXES.includes(byte));
}

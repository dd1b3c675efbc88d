import { Decoder, DecoderOptions, MemorySizeExt, Mnemonic } from 'iced-x86';

const BITS = 64;
/** The guest chooses the instructions: forget rather than grow. */
const MAX_REMEMBERED = 4096;

const remembered = new Map<string, string>();

/** How an instruction reads memory: the width in bytes (`4`, `16`), or a string form (`lods`, `rep movs`). */
export function accessForm(instruction: Uint8Array): string {
  const key = Buffer.from(instruction).toString('latin1');
  const known = remembered.get(key);
  if (known !== undefined) return known;
  if (remembered.size >= MAX_REMEMBERED) remembered.clear();
  const form = decodeForm(instruction);
  remembered.set(key, form);
  return form;
}

function decodeForm(bytes: Uint8Array): string {
  const decoder = new Decoder(BITS, bytes, DecoderOptions.None);
  const instruction = decoder.decode();
  try {
    if (instruction.isInvalid) return 'unknown';
    if (!instruction.isStringInstruction) return `${MemorySizeExt.size(instruction.memorySize)}`;
    // The mnemonic ends with the operand's size: Movsb, Cmpsq.
    const name = Mnemonic[instruction.mnemonic]!.toLowerCase().slice(0, -1);
    return instruction.hasRepPrefix || instruction.hasRepnePrefix ? `rep ${name}` : name;
  } finally {
    instruction.free();
    decoder.free();
  }
}

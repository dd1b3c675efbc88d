import {
  Decoder,
  DecoderOptions,
  InstructionInfoFactory,
  MemorySizeExt,
  OpAccess,
  type UsedMemory,
} from 'iced-x86';

const READS: ReadonlySet<OpAccess> = new Set([
  OpAccess.Read,
  OpAccess.CondRead,
  OpAccess.ReadWrite,
  OpAccess.ReadCondWrite,
]);

/**
 * How many bytes the instruction that `code` begins with reads from memory, if it does so in one place and once,
 * the stack included; `undefined` for several reads (CMPS, gathers), a repeated one, none, or a size that varies.
 */
export function onlyReadOf(code: Uint8Array): number | undefined {
  const decoder = new Decoder(64, code, DecoderOptions.None);
  const instruction = decoder.decode();
  const factory = new InstructionInfoFactory();
  const info = factory.info(instruction);
  try {
    const used = info.usedMemory() as UsedMemory[];
    // Of each is known what has to be known before all are freed.
    const reads = used
      .filter(({ access }) => READS.has(access))
      .map(({ memorySize }) => MemorySizeExt.size(memorySize));
    for (const memory of used) memory.free();
    const [size] = reads;
    return reads.length === 1 && size !== 0 && !instruction.isVsib ? size : undefined;
  } finally {
    info.free();
    factory.free();
    instruction.free();
    decoder.free();
  }
}

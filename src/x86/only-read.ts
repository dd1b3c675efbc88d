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
    const reads = (info.usedMemory() as UsedMemory[]).flatMap((memory) => {
      const { access, memorySize } = memory;
      memory.free();
      return READS.has(access) ? [MemorySizeExt.size(memorySize)] : [];
    });
    const [size] = reads;
    return reads.length === 1 && size !== 0 && !instruction.isVsib ? size : undefined;
  } finally {
    info.free();
    factory.free();
    instruction.free();
    decoder.free();
  }
}

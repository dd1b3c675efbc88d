// Which memory an instruction touches, from its bytes and the registers before it.
import {
  Code,
  Decoder,
  DecoderOptions,
  type Instruction,
  InstructionInfoFactory,
  MemorySizeExt,
  OpAccess,
  Register,
  RegisterExt,
  type UsedMemory,
} from 'iced-x86';
import { type Gva, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import { GPR_NAMES, type GprName, type Registers } from '../x86/registers.js';

/** A contiguous range that an instruction reads, writes or both. */
export interface MemoryAccess {
  readonly gva: Gva;
  readonly length: number;
  readonly read: boolean;
  readonly write: boolean;
}

interface RegisterPart {
  readonly name: GprName;
  readonly bits: number;
}

interface Operand {
  readonly segment: 'fsBase' | 'gsBase' | undefined;
  readonly base: RegisterPart | undefined;
  readonly index: RegisterPart | undefined;
  readonly scale: bigint;
  readonly displacement: bigint;
  readonly ripRelative: boolean;
  readonly addressBits: number;
  /** BT, BTS, BTR, BTC with a register: it selects a bit of a string of operands. */
  readonly bit: RegisterPart | undefined;
  readonly length: number;
  readonly read: boolean;
  readonly write: boolean;
}

/** An instruction, as far as its accesses go. */
export interface DecodedAccesses {
  /** Of the instruction, or of all the code where it does not decode. */
  readonly length: number;
  readonly operands: readonly Operand[];
}

/** A hot loop traps on a few instructions only; a hostile guest shall not fill the host's memory. */
const MOST_CACHED = 4096;
const BITS_PER_BYTE = 8n;

const cache = new Map<string, DecodedAccesses>();
const factory = new InstructionInfoFactory();

/** What the decoded instruction accesses besides itself, in the order of its operands. */
export function memoryAccesses({ operands }: DecodedAccesses, registers: Registers): MemoryAccess[] {
  return operands.map((operand) => ({
    gva: effectiveAddress(operand, registers),
    length: operand.length,
    read: operand.read,
    write: operand.write,
  }));
}

/** The part of an access that lies on the page at `page`, if any does. */
export function pieceOnPage(access: MemoryAccess, page: Gva): { gva: Gva; length: number } | undefined {
  const offset = pageOffset(access.gva);
  const firstPage = access.gva - BigInt(offset);
  if (firstPage === page) {
    return { gva: access.gva, length: Math.min(access.length, PAGE_SIZE - offset) };
  }
  const behind = offset + access.length - PAGE_SIZE;
  const nextPage = BigInt.asUintN(64, firstPage + BigInt(PAGE_SIZE));
  return behind > 0 && nextPage === page ? { gva: page, length: Math.min(behind, PAGE_SIZE) } : undefined;
}

/** The first instruction in `code`. */
export function decodeAccesses(code: Uint8Array): DecodedAccesses {
  const key = Buffer.from(code.buffer, code.byteOffset, code.byteLength).toString('latin1');
  const known = cache.get(key);
  if (known !== undefined) return known;
  if (cache.size >= MOST_CACHED) cache.clear();
  const decoded = decodeAfresh(code);
  cache.set(key, decoded);
  return decoded;
}

function decodeAfresh(code: Uint8Array): DecodedAccesses {
  const decoder = new Decoder(64, code, DecoderOptions.None);
  const instruction = decoder.decode();
  const info = factory.info(instruction);
  try {
    if (instruction.code === Code.INVALID) return { length: code.length, operands: [] };
    const operands = (info.usedMemory() as UsedMemory[]).map((memory) => {
      try {
        return operandOf(instruction, memory);
      } finally {
        memory.free();
      }
    });
    return { length: instruction.length, operands };
  } finally {
    info.free();
    instruction.free();
    decoder.free();
  }
}

function operandOf(instruction: Instruction, memory: UsedMemory): Operand {
  const base = partOf(memory.base);
  const index = partOf(memory.index);
  // A repeated string instruction has no size as a whole; its element has.
  const whole = MemorySizeExt.size(memory.memorySize);
  return {
    segment: segmentBase(memory.segment),
    base,
    index,
    scale: BigInt(memory.scale),
    displacement: memory.displacement,
    ripRelative: instruction.isIpRelMemoryOperand && memory.base === Register.None,
    addressBits: base?.bits === 32 || index?.bits === 32 ? 32 : 64,
    bit: isBitString(instruction) ? partOf(instruction.op1Register) : undefined,
    length: whole === 0 ? MemorySizeExt.size(instruction.memorySize) : whole,
    read: READS.has(memory.access),
    write: WRITES.has(memory.access),
  };
}

const READS: ReadonlySet<OpAccess> = new Set([
  OpAccess.Read,
  OpAccess.CondRead,
  OpAccess.ReadWrite,
  OpAccess.ReadCondWrite,
]);
const WRITES: ReadonlySet<OpAccess> = new Set([
  OpAccess.Write,
  OpAccess.CondWrite,
  OpAccess.ReadWrite,
  OpAccess.ReadCondWrite,
]);

function isBitString(instruction: Instruction): boolean {
  return BIT_STRINGS.has(instruction.code);
}

const BIT_STRINGS: ReadonlySet<Code> = new Set([
  Code.Bt_rm16_r16,
  Code.Bt_rm32_r32,
  Code.Bt_rm64_r64,
  Code.Bts_rm16_r16,
  Code.Bts_rm32_r32,
  Code.Bts_rm64_r64,
  Code.Btr_rm16_r16,
  Code.Btr_rm32_r32,
  Code.Btr_rm64_r64,
  Code.Btc_rm16_r16,
  Code.Btc_rm32_r32,
  Code.Btc_rm64_r64,
]);

function segmentBase(segment: Register): 'fsBase' | 'gsBase' | undefined {
  if (segment === Register.FS) return 'fsBase';
  return segment === Register.GS ? 'gsBase' : undefined;
}

function partOf(register: Register): RegisterPart | undefined {
  if (register === Register.None) return undefined;
  const name = GPR_NAMES[RegisterExt.fullRegister(register) - Register.RAX];
  return name === undefined ? undefined : { name, bits: RegisterExt.size(register) * 8 };
}

function effectiveAddress(operand: Operand, registers: Registers): Gva {
  let address = operand.displacement;
  if (operand.ripRelative) address += registers.rip;
  if (operand.base !== undefined) address += registerValue(operand.base, registers);
  if (operand.index !== undefined) address += registerValue(operand.index, registers) * operand.scale;
  if (operand.bit !== undefined) {
    // The bit's number is signed; it selects an operand of the instruction's own size.
    const operandBits = BigInt(operand.length) * BITS_PER_BYTE;
    const bit = BigInt.asIntN(operand.bit.bits, registerValue(operand.bit, registers));
    const element = (bit - (BigInt.asUintN(64, bit) % operandBits)) / operandBits;
    address += element * BigInt(operand.length);
  }
  address = BigInt.asUintN(operand.addressBits, address);
  if (operand.segment !== undefined) address += registers[operand.segment];
  return BigInt.asUintN(64, address);
}

function registerValue(part: RegisterPart, registers: Registers): bigint {
  return BigInt.asUintN(part.bits, registers[part.name]);
}

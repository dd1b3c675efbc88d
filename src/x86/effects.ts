import {
  Decoder,
  DecoderOptions,
  Instruction as IcedInstruction,
  InstructionInfoFactory,
  Mnemonic,
  OpAccess,
  OpKind,
  Register,
  RflagsBits,
} from 'iced-x86';
import { gprIndex, type Instruction } from './instruction.js';

/**
 * What an instruction does to registers and status flags. Bit n is the general-purpose register whose encoding is n;
 * the flags are `STATUS_FLAGS`.
 */
export interface Effects {
  /** What it may read, in whole or in part. */
  readonly reads: number;
  /** What it leaves nothing of, whatever its operands are. */
  readonly overwrites: number;
}

const FLAGS_SHIFT = 16;
export const STATUS_FLAGS =
  (RflagsBits.OF | RflagsBits.SF | RflagsBits.ZF | RflagsBits.AF | RflagsBits.CF | RflagsBits.PF) <<
  FLAGS_SHIFT;

const decoded = new IcedInstruction();
const infos = new InstructionInfoFactory();

/** Of a decoded instruction; that a call, a return or an interrupt leads elsewhere is left out of account. */
export function effectsOf({ bytes }: Instruction): Effects {
  const decoder = new Decoder(64, bytes, DecoderOptions.None);
  decoder.decodeOut(decoded);
  decoder.free();
  const info = infos.info(decoded);
  let reads = 0;
  let overwrites = 0;
  for (const used of info.usedRegisters()) {
    const { register, access } = used;
    used.free();
    const index = gprIndex(register);
    if (index < 0) continue;
    if (access === OpAccess.Write && register >= Register.EAX) overwrites |= 1 << index;
    else if (access !== OpAccess.Write) reads |= 1 << index;
  }
  info.free();
  if (!WRITES_SOMETIMES.has(decoded.mnemonic)) overwrites &= ~reads;
  else overwrites = 0;
  const flags = decoded.rflagsWritten | decoded.rflagsCleared | decoded.rflagsSet;
  if (writesFlagsAlways()) overwrites |= (flags << FLAGS_SHIFT) & STATUS_FLAGS;
  return { reads: reads | ((decoded.rflagsRead << FLAGS_SHIFT) & STATUS_FLAGS), overwrites };
}

/** Their destination keeps what it holds for some operands. */
const WRITES_SOMETIMES = new Set([Mnemonic.Bsf, Mnemonic.Bsr, Mnemonic.Lar, Mnemonic.Lsl]);
const SHIFTS = new Set([
  Mnemonic.Shl,
  Mnemonic.Sal,
  Mnemonic.Shr,
  Mnemonic.Sar,
  Mnemonic.Rol,
  Mnemonic.Ror,
  Mnemonic.Rcl,
  Mnemonic.Rcr,
  Mnemonic.Shld,
  Mnemonic.Shrd,
]);

/** A shift by 0, and a string instruction that is repeated 0 times, leave the flags as they are. */
function writesFlagsAlways(): boolean {
  if (decoded.hasRepPrefix || decoded.hasRepnePrefix) return false;
  if (!SHIFTS.has(decoded.mnemonic)) return true;
  const count = decoded.opCount - 1;
  return decoded.opKind(count) === OpKind.Immediate8 && decoded.immediate8 % 32 !== 0;
}

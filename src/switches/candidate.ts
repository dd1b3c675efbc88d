import type { GvaRange } from '../nt/kernel.js';
import type { Gva } from '../vmi/address.js';
import { type Instruction, Mnemonic, Register } from '../x86/instruction.js';

/** The rules that make a reading instruction look like a switch's table load, numbered as in HVMI's documentation. */
export const CANDIDATE_RULES = [
  'not-a-mov',
  'not-two-operands',
  'destination-not-a-register',
  'source-not-memory',
  'no-index-register',
  'not-a-read',
  'operands-not-4-bytes',
  'shorter-than-a-jump',
  'read-outside-kernel',
  'read-in-ssdt',
] as const;

export type CandidateRefusal = (typeof CANDIDATE_RULES)[number];

export type CandidateVerdict =
  | { readonly accepted: true }
  | { readonly accepted: false; readonly rule: number; readonly reason: CandidateRefusal };

/** Bytes of an entry of the table that a candidate reads, and of the register that it loads. */
export const TABLE_ENTRY_SIZE = 4;
const BYTE_ENTRY_SIZE = 1;
/** E9 rel32, which replaces the load. */
export const NEAR_JUMP_LENGTH = 5;

/**
 * Whether `instruction`, which was about to read `readGva`, looks like a table load: rules 0 to 9 in their
 * order, and the first that it breaks. Nothing is said about the table itself.
 */
export function checkCandidate(
  instruction: Pick<Instruction, 'mnemonic' | 'operands' | 'length'>,
  readGva: Gva,
  kernel: GvaRange,
  ssdt: GvaRange | undefined,
): CandidateVerdict {
  const { mnemonic, operands, length } = instruction;
  const [destination, source] = operands;
  if (mnemonic !== Mnemonic.Mov) return refused('not-a-mov');
  if (operands.length !== 2) return refused('not-two-operands');
  if (destination?.kind !== 'register') return refused('destination-not-a-register');
  if (source?.kind !== 'memory') return refused('source-not-memory');
  if (source.index === Register.None) return refused('no-index-register');
  if (!source.reads || source.writes) return refused('not-a-read');
  if (destination.size !== TABLE_ENTRY_SIZE || source.size !== TABLE_ENTRY_SIZE) {
    return refused('operands-not-4-bytes');
  }
  if (length < NEAR_JUMP_LENGTH) return refused('shorter-than-a-jump');
  if (!contains(kernel, readGva)) return refused('read-outside-kernel');
  if (ssdt !== undefined && contains(ssdt, readGva)) return refused('read-in-ssdt');
  return { accepted: true };
}

/**
 * Whether `instruction`, which was about to read `readGva`, looks like the byte load of a two-level switch,
 * `movzx r32, byte ptr [base + index + table]`. HVMI's rules know no loads of bytes; these are their counterpart.
 */
export function isByteCandidate(
  { mnemonic, operands, length }: Pick<Instruction, 'mnemonic' | 'operands' | 'length'>,
  readGva: Gva,
  kernel: GvaRange,
  ssdt: GvaRange | undefined,
): boolean {
  const [destination, source] = operands;
  if (mnemonic !== Mnemonic.Movzx || destination?.kind !== 'register' || source?.kind !== 'memory')
    return false;
  if (destination.size !== TABLE_ENTRY_SIZE || source.size !== BYTE_ENTRY_SIZE) return false;
  if (source.base === Register.None || source.index === Register.None || source.scale !== 1) return false;
  if (length < NEAR_JUMP_LENGTH || !contains(kernel, readGva)) return false;
  return ssdt === undefined || !contains(ssdt, readGva);
}

function refused(reason: CandidateRefusal): CandidateVerdict {
  return { accepted: false, rule: CANDIDATE_RULES.indexOf(reason), reason };
}

function contains(range: GvaRange, address: Gva): boolean {
  return address >= range.start && address < range.end;
}

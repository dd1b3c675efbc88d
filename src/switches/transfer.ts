import {
  ConditionCode,
  gprIndex,
  type Instruction,
  isHighByte,
  type MemoryOperand,
  Mnemonic,
  type Operand,
  Register,
} from '../x86/instruction.js';
import { GPR_NAMES } from '../x86/registers.js';
import { type Relation, type State, type View, type Width, widthMax } from './state.js';

/** rax, rcx, rdx, r8 to r11: what a call may change under the Windows x64 convention. */
export const VOLATILE_GPRS = [0, 1, 2, 8, 9, 10, 11];
const RAX = 0;

/** What a load from a table brings; the analysis knows the tables. */
export interface TableReader {
  /** `movzx` from a byte table with a base of ImageBase; `undefined` when it is none. */
  byteLoad(state: State, instruction: Instruction, memory: MemoryOperand): View | undefined;
  /** `mov` of a dword with a base and an index scaled by 4; `undefined` when it is none. */
  dwordLoad(state: State, instruction: Instruction, memory: MemoryOperand): View | undefined;
  /** `add dst, base` (in either order) made the target of a switch's jump out of what `load` brought. */
  targetAdded(load: number, instruction: Instruction, toImageBase: boolean): void;
}

/** Changes `state` to what is known after an instruction that is no branch. Anything not understood forgets. */
export function step(state: State, instruction: Instruction, tables: TableReader): void {
  const handled = compute(state, instruction, tables);
  if (!handled) forgetWritten(state, instruction);
  if (!handled || !isStackStore(instruction)) forgetStored(state, instruction);
}

/**
 * A call returns with registers and the flags changed, and may have written to the frame.
 *
 * @param changed bit n: the volatile register whose encoding is n
 */
export function stepCall(state: State, changed = -1): void {
  for (const register of VOLATILE_GPRS) if (changed & (1 << register)) state.clobber(register);
  state.flags = undefined;
  state.forgetAllSlots();
}

/** What holds between the numbers that set the flags, when a condition is true. */
export function relationOf(condition: ConditionCode): Relation | undefined {
  switch (condition) {
    case ConditionCode.b:
      return 'below';
    case ConditionCode.be:
      return 'below-or-equal';
    case ConditionCode.e:
      return 'equal';
    case ConditionCode.l:
      return 'less';
    case ConditionCode.le:
      return 'less-or-equal';
    case ConditionCode.ns:
    case ConditionCode.ge:
    case ConditionCode.g:
      return 'nonnegative';
    default:
      return undefined;
  }
}

const OPPOSITES = new Map([
  [ConditionCode.ae, ConditionCode.b],
  [ConditionCode.a, ConditionCode.be],
  [ConditionCode.ne, ConditionCode.e],
  [ConditionCode.ge, ConditionCode.l],
  [ConditionCode.g, ConditionCode.le],
  [ConditionCode.s, ConditionCode.ns],
  [ConditionCode.l, ConditionCode.ge],
  [ConditionCode.le, ConditionCode.g],
]);

/** What holds when a condition is false. */
export function oppositeRelation(condition: ConditionCode): Relation | undefined {
  const opposite = OPPOSITES.get(condition);
  return opposite === undefined ? undefined : relationOf(opposite);
}

/** Returns false when the instruction is not one of those understood here. */
function compute(state: State, instruction: Instruction, tables: TableReader): boolean {
  const [first, second, third] = instruction.operands;
  switch (instruction.mnemonic) {
    case Mnemonic.Nop:
      return true;
    case Mnemonic.Cmp:
      return compare(state, first!, second!);
    case Mnemonic.Test:
      return test(state, first!, second!);
    default:
  }
  if (first?.kind === 'memory') return instruction.mnemonic === Mnemonic.Mov && store(state, first, second!);
  if (instruction.mnemonic === Mnemonic.Cdqe) {
    state.write(RAX, 64, signExtended(state, RAX));
    return true;
  }
  const destination = gprOperand(first);
  if (destination === undefined || destination.highByte) return false;
  const { gpr, width } = destination;
  switch (instruction.mnemonic) {
    case Mnemonic.Mov:
    case Mnemonic.Movzx: {
      const value = tableLoad(state, instruction, second!, tables) ?? operandValue(state, second!, width);
      if (value === undefined) return false;
      state.write(gpr, width, value);
      return true;
    }
    case Mnemonic.Movsx:
    case Mnemonic.Movsxd: {
      const value = operandValue(state, second!, width);
      const source = widthOf(second!);
      if (value === undefined || source === undefined) return false;
      state.write(gpr, width, source < width ? extendSign(state, value, source) : value);
      return true;
    }
    case Mnemonic.Lea:
      return loadAddress(state, gpr, width, second!);
    case Mnemonic.Xor:
    case Mnemonic.Sub:
      return subtract(state, instruction, gpr, width, second!);
    case Mnemonic.And: {
      const value = operandValue(state, second!, width);
      if (value === undefined) return false;
      const max = Math.min(state.bound(state.low(state.get(gpr), width), width), state.bound(value, width));
      state.flags = undefined;
      state.write(gpr, width, state.fresh(width, max));
      return true;
    }
    case Mnemonic.Shr: {
      if (second?.kind !== 'immediate') return false;
      const count = Number(second.value) & (width === 64 ? 63 : 31);
      if (count === 0) return false;
      const before = state.bound(state.low(state.get(gpr), width), width);
      const after = Number.isFinite(before) ? Math.floor(before / 2 ** count) : 2 ** (width - count) - 1;
      state.flags = undefined;
      state.write(gpr, width, state.fresh(width, after));
      return true;
    }
    case Mnemonic.Add:
      return add(state, instruction, gpr, width, second!, tables);
    default:
      if (third === undefined && isConditionalMove(instruction)) {
        return conditionalMove(state, instruction, gpr, width, second!);
      }
      return false;
  }
}

function compare(state: State, first: Operand, second: Operand): boolean {
  const width = widthOf(first);
  const left = width && operandValue(state, first, width);
  const right = width && operandValue(state, second, width);
  state.flags = undefined;
  if (width && left && right) {
    const limit = state.bound(right, width);
    const exact = state.exact(right) === limit;
    if (Number.isFinite(limit)) state.flags = { kind: 'compare', left, width, limit, exact };
  }
  return true;
}

function test(state: State, first: Operand, second: Operand): boolean {
  const width = widthOf(first);
  const left = width && operandValue(state, first, width);
  state.flags = undefined;
  if (!width || !left) return true;
  if (first.kind === 'register' && second.kind === 'register' && first.register === second.register) {
    state.flags = { kind: 'test', left, width, limit: 0 };
  } else if (second.kind === 'immediate') {
    const limit = Number(~second.value & widthMask(width));
    if (limit <= widthMax(32)) state.flags = { kind: 'test', left, width, limit };
  }
  return true;
}

/** MOV to memory: of a stack slot the content is kept, any other store is left to `forgetStored`. */
function store(state: State, memory: MemoryOperand, source: Operand): boolean {
  const width = widthOf(memory);
  if (width === undefined || !isStackSlot(memory)) return true;
  const offset = Number(memory.displacement);
  const value = operandValue(state, source, width);
  if (value === undefined) state.forgetSlots(offset, memory.size);
  else state.setSlot(offset, width, value);
  return true;
}

function tableLoad(
  state: State,
  instruction: Instruction,
  source: Operand,
  tables: TableReader,
): View | undefined {
  if (source.kind !== 'memory') return undefined;
  return instruction.mnemonic === Mnemonic.Movzx
    ? tables.byteLoad(state, instruction, source)
    : tables.dwordLoad(state, instruction, source);
}

function loadAddress(state: State, gpr: number, width: Width, source: Operand): boolean {
  if (source.kind !== 'memory' || width < 32) return false;
  const { base, index, displacement, addressSize } = source;
  if (addressSize !== 8) state.write(gpr, width, state.fresh(width));
  else if (base === Register.RIP && width === 64) state.set(gpr, state.address(Number(displacement)));
  else if (index === Register.None && gprIndex(base) >= 0) {
    const view = state.low(state.get(gprIndex(base)), width);
    state.write(gpr, width, displacement === 0n ? view : plus(state, view, displacement, width));
  } else state.write(gpr, width, state.fresh(width));
  return true;
}

/** `view + addend` of `width` bits: known where `view` is. */
function plus(state: State, view: View, addend: bigint, width: Width): View {
  const value = state.exact(view);
  if (value === undefined) return state.fresh(width);
  const sum = BigInt.asUintN(width, BigInt(value) + addend);
  return sum <= BigInt(widthMax(32)) ? state.constant(Number(sum), width) : state.fresh(width);
}

/** SUB and XOR; of the same register twice they are zero. */
function subtract(
  state: State,
  instruction: Instruction,
  gpr: number,
  width: Width,
  second: Operand,
): boolean {
  const first = instruction.operands[0]!;
  const same = second.kind === 'register' && first.kind === 'register' && first.register === second.register;
  const before = state.low(state.get(gpr), width);
  if (instruction.mnemonic === Mnemonic.Sub) compare(state, first, second);
  else state.flags = undefined;
  if (same) state.write(gpr, width, state.constant(0, width));
  else if (instruction.mnemonic === Mnemonic.Sub && second.kind === 'immediate') {
    state.write(gpr, width, plus(state, before, -second.value, width));
  } else state.write(gpr, width, state.fresh(width));
  return true;
}

/** ADD: of an immediate, or of ImageBase to what a table holds. */
function add(
  state: State,
  instruction: Instruction,
  gpr: number,
  width: Width,
  second: Operand,
  tables: TableReader,
): boolean {
  state.flags = undefined;
  if (second.kind === 'immediate') {
    state.write(gpr, width, plus(state, state.low(state.get(gpr), width), second.value, width));
    return true;
  }
  if (width !== 64) return false;
  const source = gprOperand(second);
  const [a, b] = [state.origin(state.get(gpr)), source && state.origin(state.get(source.gpr))];
  const [entry, base] = a?.kind === 'entry' ? [a, b] : [b, a];
  if (entry?.kind === 'entry' && source !== undefined) {
    const isImageBase = base?.kind === 'address' && base.rva === 0;
    tables.targetAdded(entry.load, instruction, isImageBase);
    const entries = isImageBase ? entry.entries : Number.POSITIVE_INFINITY;
    state.set(gpr, state.fresh(64, undefined, { kind: 'target', load: entry.load, entries }));
  } else state.clobber(gpr);
  return true;
}

function isConditionalMove(instruction: Instruction): boolean {
  return (
    instruction.condition !== ConditionCode.None &&
    instruction.mnemonic >= Mnemonic.Cmova &&
    instruction.mnemonic <= Mnemonic.Cmovs
  );
}

function conditionalMove(
  state: State,
  instruction: Instruction,
  gpr: number,
  width: Width,
  second: Operand,
): boolean {
  const moved = operandValue(state, second, width);
  if (moved === undefined) return false;
  const { condition } = instruction;
  const kept = state.low(state.get(gpr), width);
  const boundWhen = (view: View, relation: Relation | undefined) =>
    relation === undefined ? state.bound(view, width) : state.boundUnder(view, width, relation);
  const max = Math.max(boundWhen(moved, relationOf(condition)), boundWhen(kept, oppositeRelation(condition)));
  state.write(gpr, width, state.fresh(width, max));
  return true;
}

/** Their 32-bit result always clears the upper half of its register (BSF, CMPXCHG and others do not always). */
const CLEARS_UPPER_HALF = new Set([
  Mnemonic.Add,
  Mnemonic.Adc,
  Mnemonic.Sbb,
  Mnemonic.Inc,
  Mnemonic.Dec,
  Mnemonic.Neg,
  Mnemonic.Not,
  Mnemonic.Or,
  Mnemonic.Xor,
  Mnemonic.Imul,
  Mnemonic.Bswap,
  Mnemonic.Popcnt,
  Mnemonic.Lzcnt,
  Mnemonic.Tzcnt,
  Mnemonic.Movd,
]);
/** Their store is not to an operand. */
const HIDDEN_STORES = new Set([Mnemonic.Movdir64b, Mnemonic.Enqcmd, Mnemonic.Enqcmds, Mnemonic.Clzero]);

function forgetWritten(state: State, instruction: Instruction): void {
  const first = gprOperand(instruction.operands[0]);
  for (let gpr = 0; gpr < GPR_NAMES.length; gpr++) {
    if (!(instruction.writtenGprs & (1 << gpr))) continue;
    const cleared = first?.gpr === gpr && first.width === 32 && CLEARS_UPPER_HALF.has(instruction.mnemonic);
    state.set(gpr, state.fresh(cleared ? 32 : 64));
  }
  if (instruction.writesFlags) state.flags = undefined;
  if (HIDDEN_STORES.has(instruction.mnemonic)) state.forgetAllSlots();
}

function isStackStore({ operands: [first] }: Instruction): boolean {
  return first?.kind === 'memory' && isStackSlot(first) && widthOf(first) !== undefined;
}

/** A store that is not to a known slot may hit any of them, unless it is to the image itself. */
function forgetStored(state: State, instruction: Instruction): void {
  for (const operand of instruction.operands) {
    if (operand.kind !== 'memory' || !operand.writes) continue;
    if (operand.base === Register.RIP && !operand.segmented) continue;
    if (isStackSlot(operand) && operand.size > 0) {
      state.forgetSlots(Number(operand.displacement), operand.size);
    } else state.forgetAllSlots();
  }
}

/** Below RSP nothing is a slot: an interrupt in kernel mode writes there. */
function isStackSlot({ base, index, addressSize, segmented, displacement }: MemoryOperand): boolean {
  return (
    base === Register.RSP && index === Register.None && addressSize === 8 && !segmented && displacement >= 0n
  );
}

/** What an operand of `width` bits is; a memory operand that is no slot is a new unknown of its size. */
function operandValue(state: State, operand: Operand, width: Width): View | undefined {
  switch (operand.kind) {
    case 'immediate': {
      const value = operand.value & widthMask(width);
      return value <= BigInt(widthMax(32)) ? state.constant(Number(value), width) : state.fresh(width);
    }
    case 'register': {
      const register = gprOperand(operand);
      if (register === undefined) return undefined;
      if (register.highByte) return state.fresh(8, widthMax(8));
      return state.low(state.get(register.gpr), register.width);
    }
    case 'memory': {
      const size = widthOf(operand);
      if (size === undefined) return undefined;
      if (isStackSlot(operand)) return state.slot(Number(operand.displacement), size);
      return state.fresh(size);
    }
    default:
      return undefined;
  }
}

function signExtended(state: State, gpr: number): View {
  return extendSign(state, state.low(state.get(gpr), 32), 32);
}

/** `view`, a number of `source` bits, with its sign extended to more. */
function extendSign(state: State, view: View, source: Width): View {
  if (view.width < source && !view.signed) return view; // its sign bit is zero
  if (state.bound(view, source) < 2 ** (source - 1)) return view;
  return { ...view, signed: true };
}

function gprOperand(
  operand: Operand | undefined,
): { gpr: number; width: Width; highByte: boolean } | undefined {
  if (operand?.kind !== 'register') return undefined;
  const gpr = gprIndex(operand.register);
  const width = widthOf(operand);
  return gpr < 0 || width === undefined ? undefined : { gpr, width, highByte: isHighByte(operand.register) };
}

function widthOf(operand: Operand): Width | undefined {
  if (operand.kind !== 'register' && operand.kind !== 'memory') return undefined;
  const bits = operand.size * 8;
  return bits === 8 || bits === 16 || bits === 32 || bits === 64 ? bits : undefined;
}

function widthMask(width: Width): bigint {
  return (1n << BigInt(width)) - 1n;
}

import { type ImageBytes, viewOf } from '../nt/pe.js';
import {
  Disassembler,
  FlowControl,
  gprIndex,
  type Instruction,
  type MemoryOperand,
  Mnemonic,
  Register,
} from '../x86/instruction.js';
import { GPR_NAMES, type GprName } from '../x86/registers.js';
import type { CodeRange, FunctionCode } from './functions.js';
import { State, type View } from './state.js';
import { oppositeRelation, relationOf, step, stepCall, type TableReader } from './transfer.js';

export const DWORD = 4;
/** The largest table seen in public binaries has 2,485 entries. */
export const MAX_ENTRIES = 8192;
const MAX_FUNCTION_BYTES = 512 * 1024;
/** How often instructions are looked at, again and again until nothing changes: far more than needed. */
const STEPS_PER_BYTE = 32;
const BASE_STEPS = 10_000;
/** A block that is still changing after this many visits is taken as unknown. */
const MAX_VISITS = 64;
const FAST_FAIL = 0x29n;

/** A dword or byte load with a base, a scaled index and a displacement inside the image. */
export interface TableLoad {
  readonly rva: number;
  readonly instruction: Instruction;
  readonly base: GprName;
  readonly index: GprName;
  /** Where the table begins if the base is ImageBase. */
  readonly table: number;
  /** What the index is proven to be at most; `Infinity` when nothing is. */
  readonly maxIndex: number;
  readonly baseIsImageBase: boolean;
  /** The byte load whose result is the index. */
  readonly byteLoad: number | undefined;
}

/** The `add` and `jmp` that turn what a load brought into a jump. */
export interface Dispatch {
  readonly add: Instruction;
  /** False when the `add` is not known to add ImageBase. */
  readonly toImageBase: boolean;
  readonly jmp: Instruction | undefined;
}

/** What is proven about one function. */
export class Analysis {
  /** `too-complex`: given up. `wild-jump`: an indirect jump may go anywhere, so that nothing is proven. */
  outcome: 'complete' | 'too-complex' | 'wild-jump' = 'complete';
  /** Dword loads by their address. */
  readonly loads = new Map<number, TableLoad>();
  /** Byte loads with a proven bound, by their address. */
  readonly byteLoads = new Map<number, TableLoad>();
  /** By the address of their load. */
  readonly dispatches = new Map<number, Dispatch>();
  /** By their address; the function's own, as far as control reaches them. */
  readonly instructions = new Map<number, Instruction>();
  /** Where branches go to, other than by falling through. */
  readonly branchTargets = new Set<number>();
}

/**
 * A sound abstract interpretation of one function: whatever the register values at its roots and after
 * calls, an index never exceeds the `maxIndex` of its load.
 *
 * It takes for granted what the Windows x64 convention gives: calls keep the non-volatile registers, and
 * nothing but a handler of the unwind data enters a function in its middle.
 */
export function analyse(image: ImageBytes, code: FunctionCode): Analysis {
  const bytes = code.ranges.reduce((sum, { begin, end }) => sum + end - begin, 0);
  if (bytes > MAX_FUNCTION_BYTES) {
    const analysis = new Analysis();
    analysis.outcome = 'too-complex';
    return analysis;
  }
  const interpreter = new Interpreter(image, code, BASE_STEPS + bytes * STEPS_PER_BYTE);
  try {
    return interpreter.run();
  } finally {
    interpreter.free();
  }
}

/** Entries of a table, at most `count`, cut off where the image ends. */
export function readEntries(image: ImageBytes, table: number, count: number): DataView {
  const length = Math.max(0, Math.min(count * DWORD, image.sizeOfImage - table));
  return viewOf(image.read(table, length - (length % DWORD)));
}

class OutOfSteps extends Error {}

interface Block {
  state: State;
  visits: number;
}

class Interpreter implements TableReader {
  private analysis = new Analysis();
  private readonly decoded = new Map<number, Instruction>();
  private readonly tableStarts = new Set<number>();
  private readonly blocks = new Map<number, Block>();
  /** Which block an instruction was last reached in. */
  private readonly blockOf = new Map<number, number>();
  private readonly pending = new Set<number>();
  private readonly disassemblers: { range: CodeRange; disassembler: Disassembler }[];

  constructor(
    private readonly image: ImageBytes,
    private readonly code: FunctionCode,
    private steps: number,
  ) {
    this.disassemblers = code.ranges.map((range) => ({
      range,
      disassembler: new Disassembler(image.read(range.begin, range.end - range.begin), BigInt(range.begin)),
    }));
  }

  free(): void {
    for (const { disassembler } of this.disassemblers) disassembler.free();
  }

  run(): Analysis {
    try {
      do {
        this.restart();
        for (const root of this.code.roots) {
          if (!this.tableStarts.has(root)) this.enter(root, State.unknown());
        }
        this.settle();
        for (let rva = this.unreached(); rva !== undefined; rva = this.unreached()) {
          this.enter(rva, State.unknown());
          this.settle();
        }
      } while (this.ranIntoTable());
    } catch (error) {
      if (!(error instanceof OutOfSteps)) throw error;
      this.analysis.outcome = 'too-complex';
    }
    return this.analysis;
  }

  private restart(): void {
    this.analysis = new Analysis();
    this.blocks.clear();
    this.blockOf.clear();
    this.pending.clear();
  }

  /**
   * A table is data: a call that stands before one does not return, control does not fall into it, and it is no
   * start of a leaf function. That is known only once the table's load was seen; then everything is looked at again.
   */
  private ranIntoTable(): boolean {
    const { loads, dispatches, instructions } = this.analysis;
    const known = this.tableStarts.size;
    for (const { rva, table, baseIsImageBase } of loads.values()) {
      if (baseIsImageBase && dispatches.get(rva)?.jmp && instructions.has(table)) this.tableStarts.add(table);
    }
    return this.tableStarts.size > known;
  }

  private settle(): void {
    while (this.pending.size > 0) {
      // In the order of the code, so that most blocks come after all that lead to them.
      let leader = Number.POSITIVE_INFINITY;
      for (const rva of this.pending) leader = Math.min(leader, rva);
      this.pending.delete(leader);
      this.runBlock(leader);
    }
  }

  /** Code that no known way leads to (a block after a call that does not return, a catch handler's way back). */
  private unreached(): number | undefined {
    const data = this.tableRanges();
    for (const { range } of this.disassemblers) {
      for (let rva = range.begin; rva < range.end; ) {
        const table = data.find(({ begin, end }) => rva >= begin && rva < end);
        if (table !== undefined) {
          rva = table.end;
          continue;
        }
        const known = this.decode(rva);
        if (known === undefined) rva++;
        else if (this.analysis.instructions.has(rva) || isFiller(known)) rva += known.length;
        else return rva;
      }
    }
    return undefined;
  }

  private tableRanges(): CodeRange[] {
    const { loads, byteLoads, dispatches } = this.analysis;
    const switches = [...loads.values()].filter(({ rva }) => dispatches.has(rva));
    const dwords = switches.map(({ table, maxIndex }) => ({
      begin: table,
      end: table + DWORD * (Number.isFinite(maxIndex) ? maxIndex + 1 : this.plausibleEntries(table).length),
    }));
    const bytes = [...byteLoads.values()].map(({ table, maxIndex }) => ({
      begin: table,
      end: table + maxIndex + 1,
    }));
    return [...dwords, ...bytes];
  }

  // Blocks

  /** Control may come to `rva` with `state`. */
  private enter(rva: number, state: State): void {
    if (!this.contains(rva)) return;
    const block = this.blocks.get(rva);
    const merged = block === undefined ? state.canonical() : block.state.merge(state);
    if (block === undefined) {
      this.blocks.set(rva, { state: merged, visits: 0 });
      // The block that ran through here has to stop here now.
      const through = this.blockOf.get(rva);
      if (through !== undefined) this.pending.add(through);
    } else if (block.state.equals(merged)) return;
    else block.state = ++block.visits > MAX_VISITS ? State.unknown().canonical() : merged;
    this.pending.add(rva);
  }

  private branch(target: number, state: State): void {
    if (this.contains(target)) this.analysis.branchTargets.add(target);
    this.enter(target, state);
  }

  private runBlock(leader: number): void {
    const state = this.blocks.get(leader)!.state.clone();
    let previous: Instruction | undefined;
    for (let rva = leader; this.contains(rva); ) {
      if (rva !== leader && this.blocks.has(rva)) {
        this.enter(rva, state);
        return;
      }
      if (rva !== leader && this.tableStarts.has(rva)) return;
      if (this.steps-- <= 0) throw new OutOfSteps();
      const instruction = this.decode(rva);
      if (instruction === undefined) return;
      this.analysis.instructions.set(rva, instruction);
      this.blockOf.set(rva, leader);
      if (!this.execute(state, instruction, previous)) return;
      previous = instruction;
      rva += instruction.length;
    }
  }

  /** Returns whether control goes on behind the instruction, with the changed `state`. */
  private execute(state: State, instruction: Instruction, previous: Instruction | undefined): boolean {
    const target = branchTarget(instruction);
    switch (instruction.flow) {
      case FlowControl.Next:
        step(state, instruction, this);
        return true;
      case FlowControl.ConditionalBranch: {
        step(state, instruction, this);
        const taken = state.clone();
        assume(taken, relationOf(instruction.condition));
        this.branch(target!, taken);
        assume(state, oppositeRelation(instruction.condition));
        return true;
      }
      case FlowControl.UnconditionalBranch:
        if (target === undefined) return false; // a far jump
        if (this.contains(target)) this.branch(target, state);
        else this.leave(state, instruction, previous);
        return false;
      case FlowControl.IndirectBranch:
        this.jumpIndirectly(state, instruction);
        return false;
      case FlowControl.Call:
      case FlowControl.IndirectCall:
        if (instruction.mnemonic !== Mnemonic.Call) {
          state.forget(); // SYSCALL, VMCALL: another convention
          return true;
        }
        if (target !== undefined && !this.code.roots.includes(target)) this.branch(target, State.unknown());
        stepCall(state);
        return true;
      case FlowControl.Interrupt:
        return this.interrupt(state, instruction, previous);
      case FlowControl.XbeginXabortXend:
        state.forget();
        if (target !== undefined) this.branch(target, state);
        return true;
      default:
        return false;
    }
  }

  private interrupt(state: State, instruction: Instruction, previous: Instruction | undefined): boolean {
    if (instruction.mnemonic === Mnemonic.Int3) {
      // Behind a call that does not return, and between functions, INT3 only fills; else a debugger goes on.
      const fills = previous?.mnemonic === Mnemonic.Call || previous?.mnemonic === Mnemonic.Int3;
      return !fills;
    }
    const [vector] = instruction.operands;
    if (vector?.kind === 'immediate' && vector.value === FAST_FAIL) return false;
    state.forget();
    return true;
  }

  // Switches

  /** A retpoline kernel's rewritten switch leaves by a direct jump to a thunk that jumps to the register. */
  private leave(state: State, instruction: Instruction, previous: Instruction | undefined): void {
    if (previous === undefined) return;
    for (const [load, dispatch] of this.analysis.dispatches) {
      if (dispatch.add.ip !== previous.ip) continue;
      const register = previous.operands[0];
      const origin =
        register?.kind === 'register' ? state.origin(state.get(gprIndex(register.register))) : undefined;
      if (origin?.kind !== 'target') continue;
      this.analysis.dispatches.set(load, { ...dispatch, jmp: instruction });
      this.enterCases(state, load, origin.entries);
    }
  }

  private jumpIndirectly(state: State, instruction: Instruction): void {
    const [operand] = instruction.operands;
    if (operand?.kind === 'memory') {
      if (operand.index !== Register.None) this.analysis.outcome = 'wild-jump';
      return; // through an import, or a tail call through a pointer
    }
    if (operand?.kind !== 'register') return;
    const origin = state.origin(state.get(gprIndex(operand.register)));
    if (origin?.kind === 'target') {
      const dispatch = this.analysis.dispatches.get(origin.load);
      if (dispatch !== undefined) {
        this.analysis.dispatches.set(origin.load, { ...dispatch, jmp: instruction });
      }
      this.enterCases(state, origin.load, origin.entries);
    } else if (!hasRexW(instruction)) this.analysis.outcome = 'wild-jump'; // with REX.W it is a tail call
  }

  private enterCases(state: State, load: number, entries: number): void {
    const { table } = this.analysis.loads.get(load)!;
    if (Number.isFinite(entries)) {
      const view = readEntries(this.image, table, entries);
      for (let at = 0; at < view.byteLength; at += DWORD) this.branch(view.getUint32(at, true), state);
    } else {
      for (const target of this.plausibleEntries(table)) this.branch(target, State.unknown());
    }
  }

  /** What a table of unknown length may hold: everything up to what cannot be an entry. */
  private plausibleEntries(table: number): number[] {
    const view = readEntries(this.image, table, MAX_ENTRIES);
    const entries: number[] = [];
    for (let at = 0; at < view.byteLength; at += DWORD) {
      const entry = view.getUint32(at, true);
      if (entry >= this.image.sizeOfImage) break;
      entries.push(entry);
    }
    return entries;
  }

  dwordLoad(state: State, instruction: Instruction, memory: MemoryOperand): View | undefined {
    if (instruction.mnemonic !== Mnemonic.Mov || memory.size !== DWORD) return undefined;
    const load = this.tableLoad(state, instruction, memory);
    if (load === undefined) return undefined;
    this.analysis.loads.set(load.rva, load);
    const proven = load.baseIsImageBase && load.maxIndex < MAX_ENTRIES;
    const entries = proven ? load.maxIndex + 1 : Number.POSITIVE_INFINITY;
    return state.fresh(32, undefined, { kind: 'entry', load: load.rva, entries });
  }

  byteLoad(state: State, instruction: Instruction, memory: MemoryOperand): View | undefined {
    if (memory.size !== 1) return undefined;
    const load = this.tableLoad(state, instruction, memory);
    if (load === undefined || !this.isConstantByteTable(load)) {
      this.analysis.byteLoads.delete(Number(instruction.ip)); // what was believed before more ways were found
      return undefined;
    }
    this.analysis.byteLoads.set(load.rva, load);
    const max = this.image.read(load.table, load.maxIndex + 1).reduce((a, b) => Math.max(a, b));
    return state.fresh(8, max, { kind: 'byte', load: load.rva });
  }

  /** Only bytes that nobody writes to bound what the load brings. */
  private isConstantByteTable({ baseIsImageBase, maxIndex, table }: TableLoad): boolean {
    if (!baseIsImageBase || maxIndex >= MAX_ENTRIES) return false;
    const section = this.image.sectionAt(table);
    if (section === undefined || section.writable) return false;
    return table + maxIndex < section.rva + section.virtualSize;
  }

  targetAdded(load: number, instruction: Instruction, toImageBase: boolean): void {
    const jmp = this.analysis.dispatches.get(load)?.jmp;
    this.analysis.dispatches.set(load, { add: instruction, toImageBase, jmp });
  }

  private tableLoad(state: State, instruction: Instruction, memory: MemoryOperand): TableLoad | undefined {
    const { displacement, scale, size, addressSize, segmented } = memory;
    const table = Number(displacement);
    let [base, index] = [gprIndex(memory.base), gprIndex(memory.index)];
    if (base < 0 || index < 0 || scale !== size || addressSize !== 8 || segmented) return undefined;
    if (table <= 0 || table >= this.image.sizeOfImage) return undefined;
    const isImageBase = (gpr: number) => {
      const origin = state.origin(state.get(gpr));
      return origin?.kind === 'address' && origin.rva === 0;
    };
    // Without a scale, either register may be the base.
    if (scale === 1 && !isImageBase(base)) [base, index] = [index, base];
    const view = state.get(index);
    const origin = state.origin(view);
    return {
      rva: Number(instruction.ip),
      instruction,
      base: GPR_NAMES[base]!,
      index: GPR_NAMES[index]!,
      table,
      maxIndex: state.bound(view),
      baseIsImageBase: isImageBase(base),
      byteLoad: origin?.kind === 'byte' ? origin.load : undefined,
    };
  }

  private contains(rva: number): boolean {
    return this.code.ranges.some(({ begin, end }) => rva >= begin && rva < end);
  }

  private decode(rva: number): Instruction | undefined {
    const known = this.decoded.get(rva);
    if (known !== undefined) return known;
    const piece = this.disassemblers.find(({ range }) => rva >= range.begin && rva < range.end);
    const instruction = piece?.disassembler.at(rva - piece.range.begin);
    if (instruction !== undefined) this.decoded.set(rva, instruction);
    return instruction;
  }
}

function assume(state: State, relation: ReturnType<typeof relationOf>): void {
  if (relation !== undefined) state.assume(relation);
}

function branchTarget({ operands: [operand] }: Instruction): number | undefined {
  return operand?.kind === 'branch' ? Number(operand.target) : undefined;
}

function isFiller({ mnemonic }: Instruction): boolean {
  return mnemonic === Mnemonic.Int3 || mnemonic === Mnemonic.Nop;
}

function hasRexW({ bytes }: Instruction): boolean {
  const rex = bytes.find((byte) => (byte & 0xf0) === 0x40);
  return rex !== undefined && (rex & 8) !== 0;
}

import type { ImageBytes } from '../nt/pe.js';
import {
  Disassembler,
  FlowControl,
  gprIndex,
  type Instruction,
  type MemoryOperand,
  Mnemonic,
  Register,
} from '../x86/instruction.js';
import { GPR_NAMES } from '../x86/registers.js';
import { Analysis, DWORD, MAX_ENTRIES, readEntries, type TableLoad } from './analysis.js';
import type { Callees } from './callees.js';
import {
  type CodeRange,
  type FunctionCode,
  MAX_FUNCTION_BYTES,
  rangeAt,
  START_ALIGNMENT,
} from './functions.js';
import { byteTableEnd, dwordTableEnd, isNonNegative, roomAt } from './neighbours.js';
import { type Origin, State, type View } from './state.js';
import { oppositeRelation, relationOf, step, stepCall, type TableReader } from './transfer.js';
import { Worklist } from './worklist.js';

const BYTE_MAX = 0xff;
/** A function in more pieces than this was not split by a compiler. */
const MAX_FRAGMENTS = 1024;
/** How often instructions are looked at, again and again until nothing changes: far more than needed. */
const STEPS_PER_BYTE = 32;
const BASE_STEPS = 10_000;
/** A block that is still changing after this many visits is taken as unknown. */
const MAX_VISITS = 64;
/** Entries of a table that cost as much to read as a step. */
const ENTRIES_PER_STEP = 16;
/** Slots of a frame that cost as much to merge as a step. */
const SLOTS_PER_STEP = 2;
/** A state with more quantities than this is renumbered, so that copies of it stay cheap. */
const MAX_QUANTITIES = 1024;
const FAST_FAIL = 0x29n;

/**
 * A sound abstract interpretation of one function: whatever the register values at its roots and after
 * calls, an index never exceeds the `maxIndex` of its load.
 *
 * It takes for granted what the Windows x64 convention gives: calls keep the non-volatile registers, and
 * nothing but a handler of the unwind data enters a function in its middle. And it believes the compiler that
 * a switch without a guard stays within its own table.
 *
 * @param callees says what other functions of the image change, where that may be less than the convention allows
 */
export function analyse(
  image: ImageBytes,
  code: FunctionCode,
  maxBytes = MAX_FUNCTION_BYTES,
  callees?: Callees,
): Analysis {
  const bytes = code.ranges.reduce((sum, { begin, end }) => sum + end - begin, 0);
  if (bytes > maxBytes || code.ranges.length > MAX_FRAGMENTS) {
    const analysis = new Analysis(code);
    analysis.outcome = 'too-complex';
    return analysis;
  }
  const interpreter = new Interpreter(image, code, BASE_STEPS + bytes * STEPS_PER_BYTE, callees);
  try {
    return interpreter.run();
  } finally {
    interpreter.free();
  }
}

class OutOfSteps extends Error {}

interface Block {
  state: State;
  visits: number;
}

class Interpreter implements TableReader {
  private analysis: Analysis;
  private readonly decoded = new Map<number, Instruction>();
  private readonly tableStarts = new Set<number>();
  /** What `Analysis.neighbours` will be. */
  private readonly neighbours = new Map<number, number>();
  private readonly blocks = new Map<number, Block>();
  /** Which block an instruction was last reached in. */
  private readonly blockOf = new Map<number, number>();
  private readonly pending = new Worklist();
  /** Targets of direct jumps, and what the code before falls into, as far as functions may start there. */
  private readonly jumpedTo = new Set<number>();
  private readonly fallenInto = new Set<number>();
  /** By table: for how many dwords an entry is possible. */
  private readonly plausible = new Map<number, number>();
  private readonly disassemblers = new Map<CodeRange, Disassembler>();

  constructor(
    private readonly image: ImageBytes,
    private readonly code: FunctionCode,
    private steps: number,
    private readonly callees: Callees | undefined,
  ) {
    this.analysis = new Analysis(code);
    for (const range of code.ranges) {
      const bytes = image.read(range.begin, range.end - range.begin);
      this.disassemblers.set(range, new Disassembler(bytes, BigInt(range.begin)));
    }
  }

  free(): void {
    for (const disassembler of this.disassemblers.values()) disassembler.free();
  }

  run(): Analysis {
    try {
      do {
        this.restart();
        for (const root of this.code.roots) {
          if (!this.tableStarts.has(root)) this.enter(root, State.unknown());
        }
        this.settle();
        while (this.enterUnreached() || this.enterPossibleStarts());
      } while (this.learnTables());
      for (const [table, entries] of this.neighbours) this.analysis.neighbours.set(table, entries);
    } catch (error) {
      if (!(error instanceof OutOfSteps)) throw error;
      this.analysis.outcome = 'too-complex';
    }
    return this.analysis;
  }

  private restart(): void {
    this.analysis = new Analysis(this.code);
    this.blocks.clear();
    this.blockOf.clear();
    this.pending.clear();
    this.jumpedTo.clear();
    this.fallenInto.clear();
  }

  private spend(steps: number): void {
    this.steps -= steps;
    if (this.steps < 0) throw new OutOfSteps();
  }

  /**
   * A table is data: a call that stands before one does not return, control does not fall into it, and it is no
   * start of a leaf function. That is known only once the table's load was seen, as is where a table ends that no
   * guard bounds; then everything is looked at again. Returns whether there is anything new.
   */
  private learnTables(): boolean {
    const known = this.tableStarts.size + this.neighbours.size;
    for (const load of this.switchLoads()) {
      const { table } = load;
      if (this.analysis.instructions.has(table) && this.beginsLikeTable(table)) this.tableStarts.add(table);
      this.learnEnd(load);
    }
    return this.tableStarts.size + this.neighbours.size > known;
  }

  private learnEnd(load: TableLoad): void {
    const byteLoad = this.unguardedByteLoad(load);
    if (this.neighbours.has(load.table) || (byteLoad === undefined && !isUnguarded(load))) return;
    const { entries, definite } = dwordTableEnd(this.image, this.analysis, load);
    this.spend(entries);
    if (!definite || entries === 0 || entries > load.maxIndex) return;
    this.neighbours.set(load.table, entries);
    if (byteLoad === undefined || !isNonNegative(byteLoad)) return;
    const bytes = byteTableEnd(this.image, this.analysis, byteLoad, entries);
    this.spend(bytes);
    if (bytes > 0) this.neighbours.set(byteLoad.table, bytes);
  }

  /** The byte load that brings the index of `load`, where no guard bounds its own. */
  private unguardedByteLoad({ byteLoad }: TableLoad): TableLoad | undefined {
    const load = byteLoad === undefined ? undefined : this.analysis.byteReads.get(byteLoad);
    return load !== undefined && isUnguarded(load) ? load : undefined;
  }

  /** Index 0 may be one that the switch never has, and what looks like the table's first entry be code. */
  private beginsLikeTable(table: number): boolean {
    const view = readEntries(this.image, table, 1);
    const first = view.byteLength === 0 ? undefined : view.getUint32(0, true);
    return first === 0 || (first !== undefined && this.contains(first));
  }

  /** The loads whose table is known and which a jump follows. */
  private switchLoads(): TableLoad[] {
    const { dispatches } = this.analysis;
    return this.analysis
      .dispatchedLoads()
      .filter(({ rva, baseIsImageBase }) => baseIsImageBase && dispatches.get(rva)!.toImageBase);
  }

  private settle(): void {
    // In the order of the code, so that most blocks come after all that lead to them.
    for (let leader = this.pending.take(); leader !== undefined; leader = this.pending.take()) {
      this.runBlock(leader);
    }
  }

  /**
   * Enters code that no known way leads to (a block after a call that does not return, a catch handler's way
   * back). Returns whether there was any.
   */
  private enterUnreached(): boolean {
    let data = this.tableRanges();
    let found = false;
    for (const range of this.code.ranges) {
      for (let rva = range.begin; rva < range.end; ) {
        this.spend(1);
        const table = rangeAt(data, rva);
        if (table !== undefined) {
          rva = table.end;
          continue;
        }
        const known = this.decode(rva);
        if (known === undefined) rva++;
        else if (this.analysis.instructions.has(rva) || isFiller(known)) rva += known.length;
        else if (rangeAt(data, rva + known.length - 1) !== undefined)
          rva += known.length; // padding, then a table
        else {
          found = true;
          this.enter(rva, State.unknown());
          this.settle();
          data = this.tableRanges();
        }
      }
    }
    return found;
  }

  /**
   * In a gap, what is jumped to and not fallen into may be a leaf function that others call too. Returns
   * whether this changed anything.
   */
  private enterPossibleStarts(): boolean {
    if (!this.code.leaf) return false;
    const starts = [...this.jumpedTo].filter((rva) => !this.fallenInto.has(rva));
    for (const rva of starts) {
      this.jumpedTo.delete(rva);
      this.fallenInto.add(rva);
      this.enter(rva, State.unknown());
    }
    this.settle();
    return starts.length > 0;
  }

  /** Where tables lie, in ascending order. */
  private tableRanges(): CodeRange[] {
    const switches = this.switchLoads();
    this.spend(switches.length);
    const dwords = switches.map(({ table, maxIndex }) => ({
      begin: table,
      end: table + DWORD * Math.min(maxIndex + 1, this.plausibleLength(table)),
    }));
    const bytes = [...this.analysis.byteLoads.values()].map(({ table, maxIndex }) => ({
      begin: table,
      end: table + maxIndex + 1,
    }));
    for (const load of switches) {
      const byteLoad = this.unguardedByteLoad(load);
      if (byteLoad === undefined) continue;
      const { table } = byteLoad;
      // Until its end is known, it reaches to what is known to be something else.
      const length = this.neighbours.get(table) ?? roomAt(this.image, this.analysis, table);
      bytes.push({ begin: table, end: table + length });
    }
    const merged: { begin: number; end: number }[] = [];
    for (const range of [...dwords, ...bytes].sort((a, b) => a.begin - b.begin)) {
      const last = merged.at(-1);
      if (last !== undefined && range.begin <= last.end) last.end = Math.max(last.end, range.end);
      else if (range.begin < range.end) merged.push(range);
    }
    return merged;
  }

  // Blocks

  /** Control may come to `rva` with `state`. */
  private enter(rva: number, state: State): void {
    if (!this.contains(rva)) return;
    this.spend(Math.ceil(state.slotCount / SLOTS_PER_STEP));
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
    let state = this.blocks.get(leader)!.state.clone();
    let previous: Instruction | undefined;
    for (let rva = leader; this.contains(rva); ) {
      if (rva !== leader && this.blocks.has(rva)) {
        this.enter(rva, state);
        return;
      }
      if (rva !== leader && this.tableStarts.has(rva)) return;
      this.spend(1);
      const instruction = this.decode(rva);
      if (instruction === undefined) return;
      this.analysis.instructions.set(rva, instruction);
      this.blockOf.set(rva, leader);
      if (!this.execute(state, instruction, previous)) return;
      previous = instruction;
      rva += instruction.length;
      if (rva % START_ALIGNMENT === 0) this.fallenInto.add(rva);
      if (state.quantityCount > MAX_QUANTITIES) state = state.canonical();
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
        if (target % START_ALIGNMENT === 0) this.jumpedTo.add(target);
        this.branch(target, state);
        this.jumpDirectly(state, instruction, !this.contains(target));
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
        stepCall(state, this.changedBy(target));
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

  /** Which volatile registers a call changes; of a part of this function, or of an address in memory, that may be all. */
  private changedBy(target: number | undefined): number | undefined {
    const isOther = target !== undefined && !this.contains(target);
    return isOther ? this.callees?.changedBy(target) : undefined;
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
  private jumpDirectly(state: State, instruction: Instruction, leaves: boolean): void {
    for (let gpr = 0; gpr < GPR_NAMES.length; gpr++) {
      const origin = state.origin(state.get(gpr));
      if (origin?.kind !== 'target' || !this.analysis.dispatches.get(origin.load)?.toImageBase) continue;
      this.takeSwitch(state, origin, leaves ? instruction : undefined);
      return;
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
    if (origin?.kind === 'target') this.takeSwitch(state, origin, instruction);
    else if (!hasRexW(instruction)) this.analysis.outcome = 'wild-jump'; // with REX.W it is a tail call
  }

  private takeSwitch(state: State, origin: Origin & { kind: 'target' }, jmp: Instruction | undefined): void {
    const load = this.analysis.loads.get(origin.load)!;
    const dispatch = this.analysis.dispatches.get(origin.load)!;
    if (jmp !== undefined) this.analysis.dispatches.set(origin.load, { ...dispatch, jmp });
    if (!load.baseIsImageBase || !dispatch.toImageBase || !this.isConstant(load.table, DWORD)) {
      this.analysis.outcome = 'wild-jump';
      return;
    }
    // A case that ends in a jump must not be taken for a second dispatch.
    for (let gpr = 0; gpr < GPR_NAMES.length; gpr++) {
      if (state.origin(state.get(gpr))?.kind === 'target') state.clobber(gpr);
    }
    const proven = Number.isFinite(origin.entries);
    const entries = readEntries(
      this.image,
      load.table,
      proven ? origin.entries : this.plausibleLength(load.table),
    );
    this.spend(Math.ceil(entries.byteLength / DWORD / ENTRIES_PER_STEP));
    for (let at = 0; at < entries.byteLength; at += DWORD) {
      const target = entries.getUint32(at, true);
      if (!this.contains(target)) continue;
      this.spend(1);
      this.branch(target, state);
    }
  }

  /** How long a table of unknown length may be: it ends at what cannot be an entry, or with its section. */
  private plausibleLength(table: number): number {
    let length = this.plausible.get(table);
    if (length === undefined) {
      const section = this.image.sectionAt(table);
      const room = section === undefined ? 0 : section.rva + section.virtualSize - table;
      const view = readEntries(this.image, table, Math.min(MAX_ENTRIES, Math.floor(room / DWORD)));
      const most = view.byteLength / DWORD;
      for (length = 0; length < most; length++) {
        if (view.getUint32(length * DWORD, true) >= this.image.sizeOfImage) break;
      }
      this.spend(Math.ceil(length / ENTRIES_PER_STEP));
      this.plausible.set(table, length);
    }
    return length;
  }

  dwordLoad(state: State, instruction: Instruction, memory: MemoryOperand): View | undefined {
    if (instruction.mnemonic !== Mnemonic.Mov || memory.size !== DWORD) return undefined;
    const load = this.tableLoad(state, instruction, memory);
    if (load === undefined) return undefined;
    record(this.analysis.loads, load);
    const proven = load.baseIsImageBase && load.maxIndex < MAX_ENTRIES;
    const guarded = proven ? load.maxIndex + 1 : Number.POSITIVE_INFINITY;
    const entries = Math.min(guarded, (load.baseIsImageBase && this.neighbours.get(load.table)) || guarded);
    return state.fresh(32, undefined, { kind: 'entry', load: load.rva, entries });
  }

  byteLoad(state: State, instruction: Instruction, memory: MemoryOperand): View | undefined {
    if (memory.size !== 1) return undefined;
    const load = this.tableLoad(state, instruction, memory);
    if (load === undefined) return undefined;
    const known = record(this.analysis.byteReads, load);
    if (this.isConstantByteTable(known, known.maxIndex)) this.analysis.byteLoads.set(load.rva, known);
    else this.analysis.byteLoads.delete(load.rva);
    if (!this.isConstantByteTable(load, 0)) return undefined;
    const origin = { kind: 'byte', load: load.rva } as const;
    const last = Math.min(load.maxIndex, (this.neighbours.get(load.table) ?? Number.POSITIVE_INFINITY) - 1);
    if (!this.isConstantByteTable(load, last)) return state.fresh(8, undefined, origin);
    this.spend(Math.ceil(last / ENTRIES_PER_STEP));
    const max = this.image.read(load.table, last + 1).reduce((a, b) => Math.max(a, b));
    return state.fresh(8, max, origin);
  }

  private isConstantByteTable({ baseIsImageBase, table }: TableLoad, last: number): boolean {
    return baseIsImageBase && last < MAX_ENTRIES && this.isConstant(table, last + 1);
  }

  /** Only what nobody writes to says what a load brings. */
  private isConstant(rva: number, length: number): boolean {
    const section = this.image.sectionAt(rva);
    if (section === undefined || section.writable) return false;
    return rva + length <= section.rva + section.virtualSize;
  }

  targetAdded(load: number, add: Instruction, toImageBase: boolean): void {
    const known = this.analysis.dispatches.get(load);
    if (known === undefined) this.analysis.dispatches.set(load, { add, toImageBase, jmp: undefined });
    else if (!toImageBase || known.add.ip !== add.ip) {
      this.analysis.dispatches.set(load, { ...known, toImageBase: false });
    }
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
    return rangeAt(this.code.ranges, rva) !== undefined;
  }

  private decode(rva: number): Instruction | undefined {
    const known = this.decoded.get(rva);
    if (known !== undefined) return known;
    const range = rangeAt(this.code.ranges, rva);
    const instruction = range && this.disassemblers.get(range)!.at(rva - range.begin);
    if (instruction !== undefined) this.decoded.set(rva, instruction);
    return instruction;
  }
}

/** Notes a load, and returns what holds of it in whichever block it is reached. */
function record(loads: Map<number, TableLoad>, load: TableLoad): TableLoad {
  const known = loads.get(load.rva);
  const merged =
    known === undefined
      ? load
      : {
          ...load,
          maxIndex: Math.max(known.maxIndex, load.maxIndex),
          baseIsImageBase: known.baseIsImageBase && load.baseIsImageBase && known.base === load.base,
          byteLoad: known.byteLoad === load.byteLoad ? load.byteLoad : undefined,
        };
  loads.set(load.rva, merged);
  return merged;
}

/** Every byte is at most 255: as a bound it may be that of the compiler, or no more than the type. */
function isUnguarded({ maxIndex }: TableLoad): boolean {
  return maxIndex >= MAX_ENTRIES || maxIndex === BYTE_MAX;
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

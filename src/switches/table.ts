import type { FunctionTable } from '../nt/pdata.js';
import type { ImageBytes } from '../nt/pe.js';
import { gprName, type Instruction, Mnemonic } from '../x86/instruction.js';
import type { GprName } from '../x86/registers.js';
import { type Analysis, type Dispatch, DWORD, MAX_ENTRIES, readEntries, type TableLoad } from './analysis.js';
import { Callees } from './callees.js';
import { NEAR_JUMP_LENGTH } from './candidate.js';
import { type FunctionCode, functionAt, MAX_FUNCTION_BYTES } from './functions.js';
import { analyse } from './interpreter.js';
import { type Liveness, livenessAt } from './liveness.js';
import { byteTableEnd, dwordTableEnd } from './neighbours.js';

/** Why a load is not a switch's table load with a proven end. */
export type RefusalReason =
  | 'not-in-function'
  | 'function-too-complex'
  | 'indirect-jump-unresolved'
  | 'not-a-table-load'
  | 'not-a-dword-load'
  | 'address-size-prefix'
  | 'scale-not-4'
  | 'destination-not-32-bit'
  | 'stack-pointer-as-destination'
  | 'shorter-than-a-jump'
  | 'not-a-switch'
  | 'base-not-proven'
  | 'table-outside-image'
  | 'table-not-in-executable-section'
  | 'table-in-writable-section'
  | 'bound-not-proven'
  | 'table-overlaps-code'
  | 'table-overlaps-table'
  | 'entry-outside-image'
  | 'entry-not-executable'
  | 'entry-not-an-instruction'
  | 'byte-not-an-index'
  | 'several-switches';

/** Why a table is believed to end where we say. */
export type Evidence =
  /** A compare, a mask or its type bounds the index on every way to the load. */
  | 'guard'
  /** What follows the last entry is another table, or leads to no code. */
  | 'neighbour'
  /** The number of entries is a guess; of a two-level switch, of either table. */
  | 'none';

/** One instruction of a switch. */
export interface SwitchPart {
  readonly rva: number;
  readonly length: number;
  /** Some branch goes to it. */
  readonly isBranchTarget: boolean;
}

/** The load of a byte table whose result is the index of the dword load. */
export interface ByteTable extends SwitchPart {
  readonly table: number;
  readonly entries: number;
  /** The table's content. */
  readonly values: readonly number[];
  readonly destination: GprName;
  readonly base: GprName;
  readonly index: GprName;
  /** Why the byte load has to stay as it is, whatever is done to the dword load; absent: it can be replaced too. */
  readonly refused?: RefusalReason;
}

/** A table load whose table is known from its first to its last entry. All addresses relative to the image. */
export interface FoundSwitch extends SwitchPart {
  readonly found: true;
  readonly form: 'one-level' | 'two-level';
  readonly table: number;
  readonly entries: number;
  readonly evidence: Evidence;
  /** The table's content, `entries` dwords. */
  readonly values: readonly number[];
  readonly destination: GprName;
  readonly base: GprName;
  readonly index: GprName;
  /** The base register holds ImageBase at the load; false never gets here. */
  readonly baseIsImageBase: true;
  /** Only of the two-level form. */
  readonly byteTable: ByteTable | undefined;
  /** The instruction after the load. */
  readonly back: number;
  readonly add: SwitchPart & { readonly bytes: Uint8Array };
  readonly jmp: SwitchPart & {
    /** A kernel with retpolines has replaced the jump by one to a thunk. */
    readonly retpoline: boolean;
  };
  /** Load, `add` and `jmp` stand together. */
  readonly adjacent: boolean;
  /**
   * What the code at a case may read before it writes it, by the case's address; absent: anything. Looked into for the
   * registers that the switch itself writes to, and for the flags, once somebody asks.
   */
  readonly liveAtCases: ReadonlyMap<number, Liveness>;
}

/** A load that is refused, with what is known of it. */
export interface RefusedSwitch {
  readonly found: false;
  readonly rva: number;
  readonly reason: RefusalReason;
  readonly form: 'one-level' | 'two-level' | undefined;
  readonly table: number | undefined;
}

export type SwitchSite = FoundSwitch | RefusedSwitch;

/** Functions whose analysis is kept: hot loads come in bursts from the same few. */
const KEPT_ANALYSES = 64;

/** Says which loads of an image are switch-table loads, and where their tables end. */
export class SwitchRecogniser {
  private readonly analyses = new Map<number, Analysis>();
  private readonly callees: Callees;

  constructor(
    private readonly image: ImageBytes,
    private readonly functions: FunctionTable,
    /** Larger functions are not analysed. */
    private readonly maxFunctionBytes = MAX_FUNCTION_BYTES,
  ) {
    this.callees = new Callees(image, functions);
  }

  /**
   * The switch whose dword load is at `rva`, or whose byte load is, where that can be replaced. The number of entries
   * is proven by the guard (or mask, or the index's type) on every way to the load; for the dwords of a two-level
   * switch by the content of the byte table.
   * Never throws for what the code looks like: that is a refusal.
   * @throws MemtablesError what reading the image throws
   */
  prove(rva: number): SwitchSite {
    const analysis = this.analysisAt(rva);
    if (analysis === undefined) return refuse(rva, 'not-in-function');
    const byteLoad = analysis.byteReads.get(rva);
    return byteLoad === undefined ? this.judge(analysis, rva) : this.judgeByteLoad(analysis, byteLoad);
  }

  /** Every load in the function around `rva` that is used as a switch's table load. */
  switchesAround(rva: number): SwitchSite[] {
    const analysis = this.analysisAt(rva);
    if (analysis === undefined) return [];
    const loads = analysis.dispatchedLoads().map((load) => load.rva);
    return loads.sort((a, b) => a - b).map((load) => this.judge(analysis, load));
  }

  private analysisAt(rva: number): Analysis | undefined {
    const code = functionAt(this.image, this.functions, rva);
    if (code === undefined) return undefined;
    const key = code.ranges[0]!.begin;
    const analysis = this.analyses.get(key) ?? this.analyse(code);
    this.analyses.delete(key); // back in as the last one used
    this.analyses.set(key, analysis);
    if (this.analyses.size > KEPT_ANALYSES) this.analyses.delete(this.analyses.keys().next().value!);
    return analysis;
  }

  /** What callees leave alone takes long to find out, and matters to few functions. */
  private analyse(code: FunctionCode): Analysis {
    const analysis = analyse(this.image, code, this.maxFunctionBytes);
    const { dispatches } = analysis;
    const isProven = ({ rva, baseIsImageBase }: TableLoad) =>
      baseIsImageBase && dispatches.get(rva)!.toImageBase;
    if (analysis.dispatchedLoads().every(isProven)) return analysis;
    return analyse(this.image, code, this.maxFunctionBytes, this.callees);
  }

  private judge(analysis: Analysis, rva: number): SwitchSite {
    const load = analysis.loads.get(rva);
    if (analysis.outcome === 'too-complex') {
      return { ...refuse(rva, 'function-too-complex'), table: load?.table };
    }
    if (load === undefined) return refuse(rva, whyNotALoad(analysis.instructions.get(rva)));
    const dispatch = analysis.dispatches.get(rva);
    const byteLoad = load.byteLoad === undefined ? undefined : analysis.byteReads.get(load.byteLoad);
    const form = byteLoad === undefined ? 'one-level' : 'two-level';
    const bound = this.whyRefused(analysis, load, dispatch) ?? this.boundOf(analysis, load, byteLoad);
    if (typeof bound === 'string') return { found: false, rva, reason: bound, form, table: load.table };

    const { entries, evidence } = bound;
    const [add, jmp] = [dispatch!.add, dispatch!.jmp!];
    const back = rva + load.instruction.length;
    // What is found outlives the analysis: it must not hold on to it.
    const liveAtCases = once(() => this.liveAtCases(rva));
    return {
      found: true,
      form,
      ...partOf(analysis, load.instruction),
      table: load.table,
      entries,
      evidence,
      values: this.values(load.table, entries),
      destination: destinationOf(load),
      base: load.base,
      index: load.index,
      baseIsImageBase: true,
      byteTable: byteLoad && this.byteTable(analysis, byteLoad, entries, evidence),
      back,
      add: { ...partOf(analysis, add), bytes: add.bytes },
      jmp: { ...partOf(analysis, jmp), retpoline: jmp.operands[0]?.kind === 'branch' },
      adjacent: Number(add.ip) === back && Number(jmp.ip) === back + add.length,
      get liveAtCases() {
        return liveAtCases();
      },
    };
  }

  /** The analysis may be gone by now: those of a large image would not fit into memory. */
  private liveAtCases(rva: number): Map<number, Liveness> {
    const analysis = this.analysisAt(rva)!;
    const site = this.judge(analysis, rva) as FoundSwitch;
    const written = [site.destination, site.byteTable?.destination].filter((name) => name !== undefined);
    const cases = [...new Set(site.values)].filter((entry) => analysis.instructions.has(entry));
    return livenessAt(analysis, cases, written, this.casesIn(analysis));
  }

  /** Where the switches of a function lead, by the address of their jump. */
  private casesIn(analysis: Analysis): (jmp: number) => readonly number[] | undefined {
    const loads = new Map<number, number[]>();
    for (const { rva } of analysis.dispatchedLoads()) {
      const jmp = Number(analysis.dispatches.get(rva)!.jmp!.ip);
      const others = loads.get(jmp);
      if (others === undefined) loads.set(jmp, [rva]);
      else others.push(rva);
    }
    const cases = new Map<number, readonly number[] | undefined>();
    return (jmp) => {
      const own = loads.get(jmp);
      if (own === undefined) return undefined;
      if (!cases.has(jmp)) cases.set(jmp, this.casesOf(analysis, own));
      return cases.get(jmp);
    };
  }

  /** `undefined` unless the tables of all `loads` are known. */
  private casesOf(analysis: Analysis, loads: readonly number[]): readonly number[] | undefined {
    const cases = new Set<number>();
    for (const rva of loads) {
      const site = this.judge(analysis, rva);
      if (!site.found || site.evidence === 'none') return undefined;
      for (const entry of site.values) cases.add(entry);
    }
    return [...cases];
  }

  private byteTable(analysis: Analysis, load: TableLoad, dwords: number, evidence: Evidence): ByteTable {
    const known = analysis.byteEntries(load);
    const entries = known ?? byteTableEnd(this.image, analysis, load, dwords);
    const values = [...this.image.read(load.table, entries)];
    const refused =
      this.whyByteLoadRefused(analysis, load, values, dwords) ??
      (known === undefined && (evidence !== 'none' || entries === 0) ? 'bound-not-proven' : undefined);
    return {
      ...partOf(analysis, load.instruction),
      table: load.table,
      entries,
      values,
      destination: destinationOf(load),
      base: load.base,
      index: load.index,
      ...(refused !== undefined && { refused }),
    };
  }

  /** The switch that a byte load belongs to. */
  private judgeByteLoad(analysis: Analysis, { rva, table, baseIsImageBase }: TableLoad): SwitchSite {
    const refused = (reason: RefusalReason): RefusedSwitch => ({
      ...{ found: false, rva, reason, form: 'two-level', table },
    });
    const [user] = dispatchedBy(analysis, rva);
    if (user === undefined) return refused(baseIsImageBase ? 'not-a-switch' : 'base-not-proven');
    const site = this.judge(analysis, user.rva);
    if (!site.found) return refused(site.reason);
    if (site.byteTable === undefined) return refused('not-a-switch');
    return site.byteTable.refused === undefined ? site : refused(site.byteTable.refused);
  }

  private whyByteLoadRefused(
    analysis: Analysis,
    load: TableLoad,
    values: readonly number[],
    dwords: number,
  ): RefusalReason | undefined {
    const [destination] = load.instruction.operands;
    if (destination?.kind === 'register' && destination.size !== DWORD) return 'destination-not-32-bit';
    if (destinationOf(load) === 'rsp') return 'stack-pointer-as-destination';
    if (load.instruction.length < NEAR_JUMP_LENGTH) return 'shorter-than-a-jump';
    if (dispatchedBy(analysis, load.rva).length > 1) return 'several-switches';
    // What comes between the loads may hold back bytes of which no dword is known.
    if (values.some((value) => value >= dwords)) return 'byte-not-an-index';
    const section = this.image.sectionAt(load.table);
    if (!section?.executable) return 'table-not-in-executable-section';
    return whyOverlapping(analysis, load.table, load.table + values.length);
  }

  /** The first thing that keeps a load from being a switch with a proven end. */
  private whyRefused(
    analysis: Analysis,
    load: TableLoad,
    dispatch: Dispatch | undefined,
  ): RefusalReason | undefined {
    if (dispatch?.jmp === undefined) return 'not-a-switch';
    if (load.instruction.length < NEAR_JUMP_LENGTH) return 'shorter-than-a-jump';
    if (destinationOf(load) === 'rsp') return 'stack-pointer-as-destination';
    if (!load.baseIsImageBase || !dispatch.toImageBase) return 'base-not-proven';
    const section = this.image.sectionAt(load.table);
    if (section === undefined) return 'table-outside-image';
    if (!section.executable) return 'table-not-in-executable-section';
    if (section.writable) return 'table-in-writable-section';
    if (analysis.outcome === 'wild-jump') return 'indirect-jump-unresolved';
    return undefined;
  }

  /** The number of entries, and why it is believed; or why not even the first one is. */
  private boundOf(
    analysis: Analysis,
    load: TableLoad,
    byteLoad: TableLoad | undefined,
  ): { entries: number; evidence: Evidence } | RefusalReason {
    const { table, maxIndex } = load;
    const wrong =
      maxIndex >= MAX_ENTRIES ? 'bound-not-proven' : this.whyEntriesWrong(analysis, table, maxIndex + 1);
    if (wrong === undefined) {
      const byNeighbour = byteLoad !== undefined && analysis.neighbours.has(byteLoad.table);
      return { entries: maxIndex + 1, evidence: byNeighbour ? 'neighbour' : 'guard' };
    }
    const neighbour = analysis.neighbours.get(table);
    if (neighbour !== undefined) {
      const bothEnd = byteLoad === undefined || analysis.byteEntries(byteLoad) !== undefined;
      return { entries: neighbour, evidence: bothEnd ? 'neighbour' : 'none' };
    }
    const { entries } = dwordTableEnd(this.image, analysis, load);
    return entries > 0 ? { entries, evidence: 'none' } : wrong;
  }

  private whyEntriesWrong(analysis: Analysis, table: number, entries: number): RefusalReason | undefined {
    const end = table + entries * DWORD;
    const section = this.image.sectionAt(table)!;
    if (end > section.rva + section.virtualSize) return 'table-outside-image';
    for (const entry of this.values(table, entries)) {
      if (entry === 0) continue; // an unreachable case
      if (entry >= this.image.sizeOfImage) return 'entry-outside-image';
      if (!this.image.sectionAt(entry)?.executable) return 'entry-not-executable';
      if (!analysis.isInstruction(entry)) return 'entry-not-an-instruction';
    }
    return whyOverlapping(analysis, table, end);
  }

  private values(table: number, count: number): number[] {
    const view = readEntries(this.image, table, count);
    return Array.from({ length: view.byteLength / DWORD }, (_, index) => view.getUint32(index * DWORD, true));
  }
}

function partOf({ branchTargets }: Analysis, { ip, length }: Instruction): SwitchPart {
  return { rva: Number(ip), length, isBranchTarget: branchTargets.has(Number(ip)) };
}

/** The dword loads of switches whose index is what the byte load at `byteLoad` brought. */
function dispatchedBy(analysis: Analysis, byteLoad: number): TableLoad[] {
  return analysis.dispatchedLoads().filter((load) => load.byteLoad === byteLoad);
}

function whyOverlapping(analysis: Analysis, begin: number, end: number): RefusalReason | undefined {
  if (analysis.overlapsCode(begin, end)) return 'table-overlaps-code';
  const next = analysis.nextTable(begin + 1);
  return next !== undefined && next < end ? 'table-overlaps-table' : undefined;
}

function once<Value>(make: () => Value): () => Value {
  let made: { readonly value: Value } | undefined;
  return () => {
    made ??= { value: make() };
    return made.value;
  };
}

function refuse(rva: number, reason: RefusalReason): RefusedSwitch {
  return { found: false, rva, reason, form: undefined, table: undefined };
}

function destinationOf({ instruction }: TableLoad): GprName {
  const [destination] = instruction.operands;
  if (destination?.kind !== 'register') throw new RangeError('a table load without a destination register');
  return gprName(destination.register);
}

/** Why an instruction that the analysis did not take for a table load is none. */
function whyNotALoad(instruction: Instruction | undefined): RefusalReason {
  if (instruction === undefined) return 'not-in-function';
  const [destination, source] = instruction.operands;
  if (instruction.mnemonic !== Mnemonic.Mov && instruction.mnemonic !== Mnemonic.Movzx)
    return 'not-a-table-load';
  if (destination?.kind !== 'register' || source?.kind !== 'memory') return 'not-a-table-load';
  if (source.addressSize !== 8) return 'address-size-prefix';
  if (source.size !== DWORD) return 'not-a-dword-load';
  if (source.scale !== DWORD) return 'scale-not-4';
  return 'table-outside-image';
}

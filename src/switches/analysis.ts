import { firstIndex } from '../first-index.js';
import { type ImageBytes, viewOf } from '../nt/pe.js';
import { type Instruction, MAX_INSTRUCTION_LENGTH } from '../x86/instruction.js';
import type { GprName } from '../x86/registers.js';
import type { FunctionCode } from './functions.js';

export const DWORD = 4;
/** The largest table seen in public binaries has 2,485 entries. */
export const MAX_ENTRIES = 8192;

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
  /** Every byte load that might be one of a table, by its address. */
  readonly byteReads = new Map<number, TableLoad>();
  /** Those that a guard bounds. */
  readonly byteLoads = new Map<number, TableLoad>();
  /** By the address of their load. */
  readonly dispatches = new Map<number, Dispatch>();
  /** By their address; the function's own, as far as control reaches them. */
  readonly instructions = new Map<number, Instruction>();
  /** Where branches go to, other than by falling through. */
  readonly branchTargets = new Set<number>();
  /** By table: the entries of those that no guard bounds, where what lies behind says how many there are. */
  readonly neighbours = new Map<number, number>();
  private tables: readonly number[] | undefined;

  constructor(readonly code: FunctionCode) {}

  /** The loads that a jump follows. */
  dispatchedLoads(): TableLoad[] {
    return [...this.loads.values()].filter(({ rva }) => this.dispatches.get(rva)?.jmp !== undefined);
  }

  /** How many bytes the table of a byte load has, where that is known. */
  byteEntries({ rva, table }: TableLoad): number | undefined {
    const guard = this.byteLoads.get(rva);
    return this.neighbours.get(table) ?? (guard && guard.maxIndex + 1);
  }

  /** Whether an instruction begins at `rva`, and none reaches over it. */
  isInstruction(rva: number): boolean {
    return this.instructions.has(rva) && !this.overlapsCode(rva, rva);
  }

  /** Whether an instruction begins in `[begin, end)`, or reaches over `begin` from before. */
  overlapsCode(begin: number, end: number): boolean {
    for (let rva = begin - MAX_INSTRUCTION_LENGTH + 1; rva < end; rva++) {
      const instruction = this.instructions.get(rva);
      if (instruction !== undefined && rva + instruction.length > begin) return true;
    }
    return false;
  }

  /** Where the first table begins that is not before `rva`. For a finished analysis. */
  nextTable(rva: number): number | undefined {
    this.tables ??= this.tableAddresses();
    return this.tables[firstIndex(this.tables, (table) => table >= rva)];
  }

  private tableAddresses(): number[] {
    const dwords = this.dispatchedLoads();
    const bytes = dwords.map(({ byteLoad }) => byteLoad && this.byteReads.get(byteLoad));
    const loads = [...dwords, ...bytes, ...this.byteLoads.values()];
    return loads.flatMap((load) => (load ? [load.table] : [])).sort((a, b) => a - b);
  }
}

/** Entries of a table, at most `count`, cut off where the image ends. */
export function readEntries(image: ImageBytes, table: number, count: number): DataView {
  const length = Math.max(0, Math.min(count * DWORD, image.sizeOfImage - table));
  return viewOf(image.read(table, length - (length % DWORD)));
}

import { MemtablesError } from '../errors.js';
import type { FunctionTable, RuntimeFunction } from '../nt/pdata.js';
import type { ImageBytes } from '../nt/pe.js';
import { Disassembler, FlowControl, type Instruction, Mnemonic } from '../x86/instruction.js';
import { rangeAt } from './functions.js';
import { VOLATILE_GPRS } from './transfer.js';

/** Bit n: the register whose encoding is n. */
type GprMask = number;

const VOLATILE: GprMask = VOLATILE_GPRS.reduce((mask, gpr) => mask | (1 << gpr), 0);
/** Callers rely on what small functions leave alone; of larger ones, all is taken to change. */
const MAX_FUNCTION_BYTES = 8192;
const MAX_DEPTH = 16;
/** Looking at a function costs as much as this many of its instructions. */
const STEPS_PER_FUNCTION = 16;

/**
 * Which volatile registers a function changes. By the convention it may change them all, but link-time optimisation
 * lets a caller keep values in those that the function, and what it calls, leaves alone.
 */
export class Callees {
  private readonly known = new Map<number, GprMask>();
  /** Enough to look at every byte of the image as an instruction: only code made to take long needs more. */
  private steps: number;

  constructor(
    private readonly image: ImageBytes,
    private readonly functions: FunctionTable,
  ) {
    this.steps = image.sizeOfImage;
  }

  /** The registers that may have changed when a call of the function at `rva` returns. */
  changedBy(rva: number): GprMask {
    return this.look(rva, 0);
  }

  private look(rva: number, depth: number): GprMask {
    const known = this.known.get(rva);
    if (known !== undefined) return known;
    if (depth > MAX_DEPTH) return VOLATILE;
    this.known.set(rva, VOLATILE); // what a recursion finds
    const changed = this.walk(rva, depth) & VOLATILE;
    this.known.set(rva, changed);
    return changed;
  }

  private walk(start: number, depth: number): GprMask {
    const range = this.rangeOf(start);
    if (range === undefined || range.end - range.begin > MAX_FUNCTION_BYTES) return VOLATILE;
    this.steps -= STEPS_PER_FUNCTION;
    const bytes = this.image.read(range.begin, range.end - range.begin);
    const disassembler = new Disassembler(bytes, BigInt(range.begin));
    try {
      const seen = new Set<number>();
      const pending = [start];
      let changed: GprMask = 0;
      for (let rva = pending.pop(); rva !== undefined; rva = pending.pop()) {
        if ((changed & VOLATILE) === VOLATILE || --this.steps < 0) return VOLATILE;
        if (seen.has(rva)) continue;
        seen.add(rva);
        if (rangeAt([range], rva) === undefined) {
          changed |= this.look(rva, depth + 1); // a tail call, or another fragment
          continue;
        }
        const instruction = disassembler.at(rva - range.begin);
        if (instruction === undefined) return VOLATILE;
        changed |= instruction.writtenGprs;
        const next = this.waysOn(instruction, depth);
        if (next === undefined) return VOLATILE;
        changed |= next.changed;
        pending.push(...next.targets);
      }
      return changed;
    } finally {
      disassembler.free();
    }
  }

  /** `undefined` where it is not known what is executed next. */
  private waysOn(
    { flow, mnemonic, ip, length, operands: [target] }: Instruction,
    depth: number,
  ): { readonly targets: number[]; readonly changed: GprMask } | undefined {
    const next = Number(ip) + length;
    const to = target?.kind === 'branch' ? Number(target.target) : undefined;
    switch (flow) {
      case FlowControl.Next:
        return { targets: [next], changed: 0 };
      case FlowControl.ConditionalBranch:
        return to === undefined ? undefined : { targets: [to, next], changed: 0 };
      case FlowControl.UnconditionalBranch:
        return to === undefined ? undefined : { targets: [to], changed: 0 };
      case FlowControl.Call:
        if (mnemonic !== Mnemonic.Call || to === undefined) return undefined;
        return { targets: [next], changed: this.look(to, depth + 1) };
      case FlowControl.Return:
        return mnemonic === Mnemonic.Ret ? { targets: [], changed: 0 } : undefined;
      default:
        return undefined;
    }
  }

  private rangeOf(rva: number): { readonly begin: number; readonly end: number } | undefined {
    const section = this.image.sectionAt(rva);
    if (section?.executable !== true || section.writable) return undefined;
    const entry = this.functions.entryAt(rva);
    // Where an exception is handled, the function goes on with anything in its registers.
    if (entry !== undefined) return this.handlesExceptions(entry) ? undefined : entry;
    const gap = this.functions.gapAround(rva, section.rva, section.rva + section.virtualSize);
    // A leaf function: it is short, whatever the size of the gap.
    return { begin: rva, end: Math.min(gap.end, rva + MAX_FUNCTION_BYTES) };
  }

  private handlesExceptions(entry: RuntimeFunction): boolean {
    try {
      return this.functions.unwindInfo(this.functions.primaryOf(entry)).handler !== undefined;
    } catch (error) {
      if (error instanceof MemtablesError) return true;
      throw error;
    }
  }
}

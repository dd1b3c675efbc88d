import { type Effects, effectsOf, STATUS_FLAGS } from '../x86/effects.js';
import { FlowControl, type Instruction, Mnemonic } from '../x86/instruction.js';
import { GPR_NAMES, type GprName } from '../x86/registers.js';
import type { Analysis } from './analysis.js';

/** What a piece of code may read of what was there when control came to it. */
export interface Liveness {
  readonly registers: ReadonlySet<GprName>;
  /** Any of the status flags. */
  readonly flags: boolean;
}

/** A case that takes more instructions than this is taken to need everything. */
const MAX_STEPS = 4096;
/** The same of all cases of a switch together: far more than real ones take. */
const MAX_STEPS_OF_ALL = 1 << 18;
/**
 * What a caller does not look at, if the function writes to it: rcx, r8 to r11 and the flags. Link-time optimisation
 * lets callers rely on volatile registers that a function leaves alone, but not on those that it writes to. Values are
 * returned in rax; rdx is given the benefit of the doubt.
 */
const DEAD_AT_RETURN = maskOf(['rcx', 'r8', 'r9', 'r10', 'r11']) | STATUS_FLAGS;
/**
 * Of registers, a callee may read any: link-time optimisation may have found a convention of its own for it. Flags are
 * neither handed to a callee nor kept by it.
 */
const DEAD_AT_CALL = STATUS_FLAGS;

/**
 * Which of `asked`, registers that the function writes to, and whether the flags may be read before they are
 * overwritten, on any way on from the instruction at each of `starts`. All other registers count as read.
 *
 * @param casesOf the targets of the switch that ends with the jump at an address; `undefined` when they are not known
 */
export function livenessAt(
  analysis: Analysis,
  starts: readonly number[],
  asked: readonly GprName[],
  casesOf: (jmp: number) => readonly number[] | undefined,
): Map<number, Liveness> {
  const walk = new Walk(analysis, casesOf);
  const questions = maskOf(asked) | STATUS_FLAGS;
  return new Map(
    starts.map((start) => {
      const live = walk.from(start, questions);
      const isLive = (name: GprName, gpr: number) => !asked.includes(name) || live & (1 << gpr);
      return [start, { registers: new Set(GPR_NAMES.filter(isLive)), flags: (live & STATUS_FLAGS) !== 0 }];
    }),
  );
}

class Walk {
  private readonly handlers: readonly number[];
  private readonly effects = new Map<Instruction, Effects>();
  private stepsOfAll = 0;

  constructor(
    private readonly analysis: Analysis,
    private readonly casesOf: (jmp: number) => readonly number[] | undefined,
  ) {
    const { code } = analysis;
    this.handlers = code.leaf ? [] : code.roots.slice(1);
  }

  /** What of `asked` may be read. */
  from(start: number, asked: number): number {
    let live = 0;
    let raised = 0;
    let steps = 0;
    const looked = new Map<number, number>();
    /** What was asked for and is still there, by where control has come to. */
    const pending: [rva: number, questions: number][] = [[start, asked]];
    const goOn = (targets: readonly number[], questions: number) => {
      this.stepsOfAll += targets.length;
      for (const target of targets) pending.push([target, questions]);
    };
    for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
      const [rva, all] = next;
      const before = looked.get(rva) ?? 0;
      const questions = all & ~before & ~live;
      if (questions === 0) continue;
      looked.set(rva, before | questions);
      const instruction = this.analysis.instructions.get(rva);
      if (++steps > MAX_STEPS || this.stepsOfAll > MAX_STEPS_OF_ALL) return asked;
      if (instruction === undefined) {
        live |= questions;
        continue;
      }
      // An exception handler of the function finds the registers as they are at whichever instruction raises it.
      const unraised = questions & ~STATUS_FLAGS & ~raised;
      if (unraised !== 0) goOn(this.handlers, unraised);
      raised |= unraised;
      const { reads, overwrites } = this.effectsOf(instruction);
      live |= questions & reads;
      const rest = questions & ~reads & ~overwrites;
      const { targets, leaves } = waysOn(instruction, this.casesOf);
      live |= rest & leaves;
      if (rest !== 0) goOn(targets, rest);
    }
    return live;
  }

  private effectsOf(instruction: Instruction): Effects {
    let effects = this.effects.get(instruction);
    if (effects === undefined) {
      effects = effectsOf(instruction);
      this.effects.set(instruction, effects);
    }
    return effects;
  }
}

interface WaysOn {
  readonly targets: readonly number[];
  /** What somebody else may read, besides. */
  readonly leaves: number;
}

const ALL = -1;

function waysOn(
  { flow, mnemonic, ip, length, operands: [target] }: Instruction,
  casesOf: (jmp: number) => readonly number[] | undefined,
): WaysOn {
  const next = Number(ip) + length;
  // A target that is not one of the function's instructions is found to be none when control gets there.
  const branches = target?.kind === 'branch' ? [Number(target.target)] : [];
  switch (flow) {
    case FlowControl.Next:
      return { targets: [next], leaves: 0 };
    case FlowControl.ConditionalBranch:
      return { targets: [...branches, next], leaves: 0 };
    case FlowControl.UnconditionalBranch:
    case FlowControl.IndirectBranch: {
      const targets = casesOf(Number(ip)) ?? branches;
      return { targets, leaves: targets.length === 0 ? ALL : 0 };
    }
    case FlowControl.Call:
    case FlowControl.IndirectCall:
      return mnemonic === Mnemonic.Call
        ? { targets: [], leaves: ~DEAD_AT_CALL }
        : { targets: [], leaves: ALL };
    case FlowControl.Return:
      return { targets: [], leaves: mnemonic === Mnemonic.Ret ? ~DEAD_AT_RETURN : ALL };
    default:
      return { targets: [], leaves: ALL };
  }
}

function maskOf(names: readonly GprName[]): number {
  return names.reduce((mask, name) => mask | (1 << GPR_NAMES.indexOf(name)), 0);
}

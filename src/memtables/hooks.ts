import { MemtablesError } from '../errors.js';
import { type DetourPlan, type DetourRefusal, MAX_TRAMPOLINE_SIZE, planDetour } from '../hooks/detour.js';
import { surveyFunction } from '../hooks/survey.js';
import type { Kernel } from '../nt/kernel.js';
import type { FunctionTable } from '../nt/pdata.js';
import type { Section } from '../nt/pe.js';
import { scanGuest } from '../safety/scan.js';
import type { SlackAllocator, SlackBlock } from '../slack/allocator.js';
import { type Instability, instabilityOf } from '../slack/regions.js';
import type { CodeRange } from '../switches/functions.js';
import type { Gva } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { whileQuiescent } from '../vmi/quiescence.js';
import { symbolOfHook } from './hook-name.js';
import { describeObstacles } from './obstacles.js';
import { letGuestRun } from './patience.js';
import { interiorOf, type Redirection, type Redirections } from './redirections.js';

/** A function's first bytes are left within microseconds, or within a time slice if it was preempted there. */
const ATTEMPTS = 200;
const PAUSE_MS = 10;
/** The guest is paused while a function is decoded. */
const MOST_FUNCTION_BYTES = 128 * 1024;

/** Why a function cannot be hooked. */
export type HookRefusal =
  | DetourRefusal
  | Instability
  | 'not-code'
  | 'not-a-function-start'
  | 'too-large'
  | 'not-in-memory'
  | 'hooked-already'
  | 'overlaps-relocation'
  | 'in-use';

interface CodePart {
  readonly gva: Gva;
  readonly length: number;
}

/** The part of a function that holds its entry, and what the compiler has moved elsewhere. */
interface HookedFunction extends CodePart {
  readonly others: readonly CodePart[];
}

/** Places transparent detours: the function does what it did, by way of a trampoline in slack. */
export class Hooks {
  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly kernel: Kernel,
    private readonly functions: FunctionTable,
    private readonly slack: SlackAllocator,
    private readonly redirections: Redirections,
    private readonly readOriginal: (gva: Gva, length: number) => Uint8Array | undefined,
  ) {}

  /**
   * Hooks `nt!Name`.
   *
   * @throws MemtablesError `SYMBOL_NOT_FOUND`; `HOOK_REFUSED` with the reason in its context when the function
   *   cannot be hooked; `SLACK_EXHAUSTED`. The guest is as before then.
   */
  place(name: string): Redirection {
    const target = this.#locate(name);
    let inTheWay: readonly string[] = [];
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      const hook = whileQuiescent(this.hypervisor, () => this.#attempt(name, target));
      if ('code' in hook) return hook;
      inTheWay = hook;
      letGuestRun(this.hypervisor, PAUSE_MS);
    }
    throw refused(name, 'in-use', 'Try again, when the guest is less busy there.', inTheWay);
  }

  /** The hook, or what stands in the way now. */
  #attempt(name: string, target: HookedFunction): Redirection | readonly string[] {
    const slack = this.slack.allocate(MAX_TRAMPOLINE_SIZE);
    let plan: DetourPlan | readonly string[] = [];
    try {
      plan = this.#plan(name, target, slack);
    } finally {
      if (!('entry' in plan)) this.slack.free(slack);
    }
    if (!('entry' in plan)) return plan;
    const { trampoline: code, entry: jump } = plan;
    return this.redirections.install({ kind: 'hook', label: name, code, jump, slack });
  }

  #plan(
    name: string,
    { gva, length, others }: HookedFunction,
    slack: SlackBlock,
  ): DetourPlan | readonly string[] {
    const code = { gva, bytes: this.#read(name, gva, length), imageBase: this.kernel.base };
    const branchTargets = others.flatMap((part) => this.#targetsOf(name, part));
    const plan = planDetour({ ...code, branchTargets }, slack.gva);
    if (plan.refused !== undefined) throw refused(name, plan.refused, 'Hook another function.');
    const replaced = plan.entry.bytes.length;
    if (this.redirections.overlapping(gva, replaced) !== undefined) {
      throw refused(name, 'overlaps-relocation', 'Place hooks before table loads are relocated.');
    }
    const interior = interiorOf(gva, replaced, name);
    const { findings, unsettled } = scanGuest(this.hypervisor, this.kernel, [interior]);
    // The replaced bytes hold no call, so that nothing but a RIP leads into them.
    const obstacles = { findings: findings.filter(({ isRip }) => isRip), unsettled };
    const inTheWay = describeObstacles(obstacles);
    return inTheWay.length > 0 ? inTheWay : plan;
  }

  /** Where a part of the function that was moved away jumps to. */
  #targetsOf(name: string, { gva, length }: CodePart): readonly Gva[] {
    const bytes = this.#read(name, gva, length);
    const survey = surveyFunction({ gva, bytes, imageBase: this.kernel.base }, 0);
    if (survey === undefined) throw refused(name, 'undecodable', 'Hook another function.');
    return survey.targets;
  }

  #read(name: string, gva: Gva, length: number): Uint8Array {
    const bytes = this.readOriginal(gva, length);
    if (bytes === undefined) throw refused(name, 'not-in-memory', 'Hook another function.');
    return bytes;
  }

  #locate(name: string): HookedFunction {
    const symbol = symbolOfHook(name);
    if (this.redirections.ofKind('hook').some((hook) => hook.label === name)) {
      throw refused(name, 'hooked-already', 'Hook each function once.');
    }
    const rva = this.kernel.symbolRva(symbol);
    const { image } = this.kernel;
    const section = image.sectionAt(rva);
    if (section === undefined || !section.executable) throw refused(name, 'not-code', 'Name a function.');
    const instability = instabilityOf(section);
    if (instability !== undefined) {
      throw refused(
        name,
        instability,
        `Hook a function outside ${section.name}, whose code may not be changed.`,
      );
    }
    const [own, ...others] = this.#partsOf(name, rva, section).map(({ begin, end }) => ({
      gva: this.kernel.base + BigInt(begin),
      length: end - begin,
    }));
    if (own!.length > MOST_FUNCTION_BYTES) throw refused(name, 'too-large', 'Hook another function.');
    return { ...own!, others };
  }

  /**
   * Where the function's code is, the part with its entry first. A leaf function, which has no unwind data, ends at the
   * next symbol.
   */
  #partsOf(name: string, rva: number, section: Section): readonly CodeRange[] {
    const entry = this.functions.entryAt(rva);
    if (entry !== undefined) {
      if (entry.begin !== rva) throw refused(name, 'not-a-function-start', 'Name the function itself.');
      return [entry, ...this.functions.fragmentsOf(entry).filter((fragment) => fragment !== entry)];
    }
    const gap = this.functions.gapAround(rva, section.rva, section.rva + section.virtualSize);
    return [{ begin: rva, end: Math.min(gap.end, this.kernel.profile.symbolAfter(rva) ?? gap.end) }];
  }
}

function refused(
  name: string,
  reason: HookRefusal,
  remedy: string,
  inTheWay?: readonly string[],
): MemtablesError {
  return new MemtablesError('HOOK_REFUSED', `${name} cannot be hooked: ${reason}`, {
    remedy,
    context: { function: name, reason, ...(inTheWay && { inTheWay }) },
  });
}

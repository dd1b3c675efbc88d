import { MemtablesError } from '../errors.js';
import { type DetourPlan, type DetourRefusal, MAX_TRAMPOLINE_SIZE, planDetour } from '../hooks/detour.js';
import { surveyFunction } from '../hooks/survey.js';
import type { KernelImage } from '../nt/kernel-image.js';
import type { KernelImages } from '../nt/kernel-images.js';
import type { Section } from '../nt/pe.js';
import type { SlackBlock } from '../slack/allocator.js';
import { type Instability, instabilityOf } from '../slack/regions.js';
import type { SlackOfImages } from '../slack/slack-of-images.js';
import type { CodeRange } from '../switches/functions.js';
import type { Gva } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { whileQuiescent } from '../vmi/quiescence.js';
import { parseHookName } from './hook-name.js';
import { describeObstacles, occupantsOf } from './obstacles.js';
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
  | 'image-unreadable'
  | 'image-has-changed'
  | 'hooked-already'
  | 'overlaps-relocation'
  | 'in-use';

interface CodePart {
  readonly gva: Gva;
  readonly length: number;
}

/** The part of a function that holds its entry, and what the compiler has moved elsewhere. */
interface HookedFunction extends CodePart {
  readonly image: KernelImage;
  readonly others: readonly CodePart[];
}

/** Places transparent detours: the function does what it did, by way of a trampoline in slack. */
export class Hooks {
  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly images: KernelImages,
    private readonly slack: SlackOfImages,
    private readonly redirections: Redirections,
    private readonly readOriginal: (gva: Gva, length: number) => Uint8Array | undefined,
  ) {}

  /**
   * Hooks `nt!Name`, `module!Name` of what a module exports, or `module+0xRVA`.
   *
   * @throws MemtablesError `INVALID_ARGUMENT`; `SYMBOL_NOT_FOUND`, also for a module that is not loaded; `IMAGE_INVALID`
   *   when the module's exports are damaged; `HOOK_REFUSED` with the reason in its context when the function cannot be
   *   hooked; `SLACK_EXHAUSTED`. The guest is as before then.
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
    const slack = this.slack.for(target.image).allocate(MAX_TRAMPOLINE_SIZE);
    let plan: DetourPlan | readonly string[] = [];
    try {
      plan = this.#plan(name, target, slack);
    } finally {
      if (!('entry' in plan)) this.slack.free(slack);
    }
    if (!('entry' in plan)) return plan;
    const { trampoline: code, entry: jump } = plan;
    return this.redirections.install({ kind: 'hook', label: name, code, jump, slack, isDivided: true });
  }

  #plan(
    name: string,
    { image, gva, length, others }: HookedFunction,
    slack: SlackBlock,
  ): DetourPlan | readonly string[] {
    if (!this.images.isCurrent(image)) throw refused(name, 'image-has-changed', 'Try again.');
    const code = { gva, bytes: this.#read(name, gva, length), imageBase: image.base };
    const branchTargets = others.flatMap((part) => this.#targetsOf(name, part, image));
    const plan = planDetour({ ...code, branchTargets }, slack.gva);
    if (plan.refused !== undefined) throw refused(name, plan.refused, 'Hook another function.');
    const replaced = plan.entry.bytes.length;
    if (this.redirections.overlapping(gva, replaced) !== undefined) {
      throw refused(name, 'overlaps-relocation', 'Place hooks before table loads are relocated.');
    }
    const interior = interiorOf(gva, replaced, name);
    const inTheWay = describeObstacles(occupantsOf(this.hypervisor, this.images.nt, [interior]));
    return inTheWay.length > 0 ? inTheWay : plan;
  }

  /** Where a part of the function that was moved away jumps to. */
  #targetsOf(name: string, { gva, length }: CodePart, { base: imageBase }: KernelImage): readonly Gva[] {
    const bytes = this.#read(name, gva, length);
    const survey = surveyFunction({ gva, bytes, imageBase }, 0);
    if (survey === undefined) throw refused(name, 'undecodable', 'Hook another function.');
    return survey.targets;
  }

  #read(name: string, gva: Gva, length: number): Uint8Array {
    const bytes = this.readOriginal(gva, length);
    if (bytes === undefined) throw refused(name, 'not-in-memory', 'Hook another function.');
    return bytes;
  }

  #locate(name: string): HookedFunction {
    const target = parseHookName(name);
    const image = this.#imageOf(name, target.module);
    const rva = 'rva' in target ? target.rva : image.symbolRva(target.symbol);
    if (this.redirections.ofKind('hook').some((hook) => hook.at === image.gva(rva))) {
      throw refused(name, 'hooked-already', 'Hook each function once.');
    }
    const section = image.image.sectionAt(rva);
    if (section === undefined || !section.executable) throw refused(name, 'not-code', 'Name a function.');
    const instability = instabilityOf(section);
    if (instability !== undefined) {
      throw refused(
        name,
        instability,
        `Hook a function outside ${section.name}, whose code may not be changed.`,
      );
    }
    const [own, ...others] = partsOf(name, rva, section, image).map(({ begin, end }) => ({
      gva: image.gva(begin),
      length: end - begin,
    }));
    if (own!.length > MOST_FUNCTION_BYTES) throw refused(name, 'too-large', 'Hook another function.');
    return { ...own!, image, others };
  }

  /** The list of modules is read again for one that may have been loaded since. */
  #imageOf(name: string, module: string): KernelImage {
    let image = this.images.named(module);
    if (image === undefined) {
      this.images.refresh();
      image = this.images.named(module);
    }
    if (image === 'unreadable') {
      throw refused(name, 'image-unreadable', 'Hook a function of another module.');
    }
    if (image !== undefined) return image;
    throw new MemtablesError('SYMBOL_NOT_FOUND', `no kernel module ${module} is loaded`, {
      remedy: 'Check the spelling; a module is named by its file name, NT itself is nt.',
      context: { function: name, module },
    });
  }
}

/**
 * Where the function's code is, the part with its entry first. A leaf function, which has no unwind data, ends at the
 * next symbol.
 */
function partsOf(name: string, rva: number, section: Section, image: KernelImage): readonly CodeRange[] {
  const { functions } = image;
  const entry = functions.entryAt(rva);
  if (entry !== undefined) {
    if (entry.begin !== rva) throw refused(name, 'not-a-function-start', 'Name the function itself.');
    return [entry, ...functions.fragmentsOf(entry).filter((fragment) => fragment !== entry)];
  }
  const gap = functions.gapAround(rva, section.rva, section.rva + section.virtualSize);
  return [{ begin: rva, end: Math.min(gap.end, image.symbolAfter(rva) ?? gap.end) }];
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

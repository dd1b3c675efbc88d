import { MemtablesError } from '../errors.js';
import { MAX_TRAMPOLINE_SIZE, planDetour } from '../hooks/detour.js';
import type { Kernel } from '../nt/kernel.js';
import { FunctionTable } from '../nt/pdata.js';
import type { Section } from '../nt/pe.js';
import { scanGuest } from '../safety/scan.js';
import type { SlackAllocator, SlackBlock } from '../slack/allocator.js';
import { instabilityOf } from '../slack/regions.js';
import type { Gva } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { whileQuiescent } from '../vmi/quiescence.js';
import { symbolOfHook } from './hook-name.js';
import { letGuestRun } from './patience.js';
import { interiorOf, type Redirection, type Redirections } from './redirections.js';

/** A function's first bytes are left within microseconds, or within a time slice if it was preempted there. */
const ATTEMPTS = 200;
const PAUSE_MS = 10;

/** Places transparent detours: the function does what it did, by way of a trampoline in slack. */
export class Hooks {
  readonly #functions: FunctionTable;

  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly kernel: Kernel,
    private readonly slack: SlackAllocator,
    private readonly redirections: Redirections,
    private readonly readOriginal: (gva: Gva, length: number) => Uint8Array,
  ) {
    this.#functions = FunctionTable.read(kernel.image);
  }

  /**
   * Hooks `nt!Name`.
   *
   * @throws MemtablesError `SYMBOL_NOT_FOUND`; `HOOK_REFUSED` with the reason in its context when the function
   *   cannot be hooked; `SLACK_EXHAUSTED`. The guest is as before then.
   */
  place(name: string): Redirection {
    const target = this.#locate(name);
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      const hook = whileQuiescent(this.hypervisor, () => this.#attempt(name, target));
      if (hook !== undefined) return hook;
      letGuestRun(this.hypervisor, PAUSE_MS);
    }
    throw refused(name, 'in-use', 'Try again: threads kept standing in its first instructions.');
  }

  /** Gives the slack back unless the trampoline is in it. */
  #attempt(name: string, target: { gva: Gva; length: number }): Redirection | undefined {
    const slack = this.slack.allocate(MAX_TRAMPOLINE_SIZE);
    let hook: Redirection | undefined;
    try {
      hook = this.#tryPlace(name, target, slack);
    } finally {
      if (hook === undefined) this.slack.free(slack);
    }
    return hook;
  }

  /** `undefined` when a thread stands in the bytes that would be replaced. */
  #tryPlace(name: string, target: { gva: Gva; length: number }, slack: SlackBlock): Redirection | undefined {
    const bytes = this.readOriginal(target.gva, target.length);
    const plan = planDetour({ gva: target.gva, bytes, imageBase: this.kernel.base }, slack.gva);
    if (plan.refused !== undefined) throw refused(name, plan.refused, 'Hook another function.');
    const { length } = plan.entry.bytes;
    if (this.redirections.overlapping(target.gva, length) !== undefined) {
      throw refused(name, 'overlaps-relocation', 'Place hooks before table loads are relocated.');
    }
    const interior = interiorOf(target.gva, length, name);
    const { findings, unsettled } = scanGuest(this.hypervisor, this.kernel, [interior]);
    // The replaced bytes hold no call, so that nothing but a RIP leads into them.
    if (unsettled.length > 0 || findings.some(({ isRip }) => isRip)) return undefined;
    return this.redirections.install('hook', name, { code: plan.trampoline, jump: plan.entry }, slack);
  }

  #locate(name: string): { gva: Gva; length: number } {
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
    const end = this.#endOf(name, rva, section);
    return { gva: this.kernel.base + BigInt(rva), length: end - rva };
  }

  /** Where the function's code ends; of a leaf function, which has no unwind data, at the next symbol. */
  #endOf(name: string, rva: number, section: Section): number {
    const entry = this.#functions.entryAt(rva);
    if (entry !== undefined) {
      if (entry.begin !== rva) throw refused(name, 'not-a-function-start', 'Name the function itself.');
      return entry.end;
    }
    const gap = this.#functions.gapAround(rva, section.rva, section.rva + section.virtualSize);
    return Math.min(gap.end, this.kernel.profile.symbolAfter(rva) ?? gap.end);
  }
}

function refused(name: string, reason: string, remedy: string): MemtablesError {
  return new MemtablesError('HOOK_REFUSED', `${name} cannot be hooked: ${reason}`, {
    remedy,
    context: { function: name, reason },
  });
}

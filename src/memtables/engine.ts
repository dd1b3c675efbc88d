import { CloakMap } from '../cloak/cloak-map.js';
import type { HandlerChoice } from '../handlers/planner.js';
import type { Journal } from '../journal/journal.js';
import type { Kernel } from '../nt/kernel.js';
import { KernelImages } from '../nt/kernel-images.js';
import { SlackOfImages } from '../slack/slack-of-images.js';
import type { Gva } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { whileQuiescent } from '../vmi/quiescence.js';
import { InstructionCache } from '../x86/instruction-cache.js';
import { Ahead, type Place } from './ahead.js';
import { Hooks } from './hooks.js';
import { Monitor } from './monitor.js';
import { type CodeChange, Patcher } from './patcher.js';
import { Recognisers } from './recognisers.js';
import { type Redirection, Redirections } from './redirections.js';
import { type Outcome, type Prepared, Relocator } from './relocator.js';
import type { EngineEvent, LoadCounts, Statistics, UnloadReport } from './report.js';
import { ignoreAll, SiteTable } from './sites.js';
import { UnloadedModules } from './unloaded-modules.js';
import { Unloader } from './unloader.js';

/**
 * How many switches are relocated while the guest is paused once. To look at all of its threads takes longer than to
 * relocate one of them.
 */
const MOST_AT_ONCE = 16;

export interface EngineOptions {
  /** A load is relocated once it has trapped more often than this. */
  readonly threshold: number;
  /** What hot loads are replaced by. */
  readonly handler: HandlerChoice;
  /** Whether switches whose tables are on trapped pages are relocated before they have trapped. */
  readonly ahead?: boolean;
  /** How long `unload` waits for threads to leave our code. */
  readonly unloadSeconds: number;
  readonly report: (event: EngineEvent) => void;
}

/**
 * Hides hooks in a guest's kernel and relocates the table loads that this makes expensive.
 *
 * Violations are answered while the hypervisor listens; whoever owns the hypervisor calls `work` between two
 * listens, and `unload` before it goes away.
 */
export class Engine {
  readonly #hypervisor: Hypervisor;
  readonly #options: EngineOptions;
  readonly #cloaks = new CloakMap<CodeChange>();
  readonly #sites = new SiteTable();
  readonly #images: KernelImages;
  readonly #slack: SlackOfImages;
  readonly #patcher: Patcher;
  readonly #redirections: Redirections;
  readonly #monitor: Monitor;
  readonly #hooks: Hooks;
  readonly #relocator: Relocator;
  readonly #unloadedModules: UnloadedModules;
  readonly #unloader: Unloader;
  readonly #ahead: Ahead | undefined;
  /** What the guest has written over and is not retired yet: it is kept where that fails. */
  readonly #overwritten = new Set<Redirection>();
  /** What the user has been told of. */
  readonly #takenBack = new WeakSet<Redirection>();
  #loaded = true;

  /**
   * Begins to answer violations; changes nothing in the guest.
   *
   * @throws MemtablesError `IMAGE_INVALID`, `SYMBOL_NOT_FOUND`, `PROFILE_INVALID`, or of the hypervisor
   */
  constructor(hypervisor: Hypervisor, kernel: Kernel, journal: Journal, options: EngineOptions) {
    this.#hypervisor = hypervisor;
    this.#options = options;
    const instructions = new InstructionCache();
    this.#patcher = new Patcher(hypervisor, kernel.memory, journal, this.#cloaks, instructions);
    const readOriginal = (gva: Gva, length: number) => this.#patcher.readOriginal(gva, length);
    this.#images = new KernelImages(kernel, readOriginal);
    const recognisers = new Recognisers();
    this.#ahead = options.ahead ? new Ahead(this.#images, recognisers) : undefined;
    this.#slack = new SlackOfImages(this.#images.permanent(), kernel.memory);
    this.#redirections = new Redirections(this.#patcher, this.#slack);
    this.#monitor = new Monitor(
      hypervisor,
      this.#images,
      this.#cloaks,
      instructions,
      this.#sites,
      options.threshold,
    );
    this.#hooks = new Hooks(hypervisor, this.#images, this.#slack, this.#redirections, readOriginal);
    this.#relocator = new Relocator(
      hypervisor,
      this.#images,
      recognisers,
      this.#sites,
      this.#slack,
      this.#redirections,
      readOriginal,
      options.handler,
    );
    this.#unloadedModules = new UnloadedModules(hypervisor, kernel, this.#patcher, this.#redirections);
    this.#unloader = new Unloader(hypervisor, kernel, this.#redirections);
    hypervisor.onViolation((violation) => this.#monitor.handle(violation), this.#monitor);
  }

  /** False once everything has been taken out of the guest. */
  get loaded(): boolean {
    return this.#loaded;
  }

  /** True when `work` has something to do. */
  get hasWork(): boolean {
    return (
      this.#monitor.hasWork ||
      this.#unloader.hasWork ||
      this.#images.isRefreshDue ||
      this.#unloadedModules.isCheckDue
    );
  }

  /** How many kernel modules were loaded besides NT when it was last looked. */
  get moduleCount(): number {
    return this.#images.moduleCount;
  }

  /** Whether hot table loads are relocated; they are counted in any case. */
  set relocating(enabled: boolean) {
    this.#monitor.relocating = enabled;
  }

  /**
   * Places a transparent detour on `nt!Name`, `module!Name` or `module+0xRVA`.
   *
   * @throws MemtablesError see `Hooks.place`
   */
  hook(name: string): void {
    const hook = this.#hooks.place(name);
    this.#options.report({
      type: 'hooked',
      name,
      function: hook.at,
      trampoline: hook.slack.gva,
      replacedBytes: hook.length,
    });
    this.#planAhead([
      { gva: hook.at, bytes: hook.length },
      { gva: hook.slack.gva, bytes: hook.slack.size },
    ]);
  }

  /**
   * The work step: deals with the guest's writes to hidden bytes and with modules that it has unloaded, and relocates
   * the next hot loads. To be called between two listens, for as long as there is work.
   *
   * @throws MemtablesError of the hypervisor; the change under way has been taken back then
   */
  work(): void {
    if (!this.hasWork) return;
    if (this.#images.isRefreshDue) this.#images.refresh();
    const hasLost = this.#unloadedModules.isCheckDue && this.#unloadedModules.hasLost();
    const batch = this.#prepareBatch();
    if (batch.length === 0 && !hasLost && !this.#monitor.hasWrites && !this.#unloader.hasWork) return;
    const outcomes: Outcome[] = [];
    try {
      whileQuiescent(this.#hypervisor, () => {
        this.#yieldToGuest();
        this.#unloader.tidyUp();
        this.#relocate(batch, outcomes);
      });
    } finally {
      for (const outcome of outcomes) this.#options.report(outcome);
      // What something has failed before.
      for (const { hot } of batch) this.#monitor.postpone(hot);
    }
    for (const outcome of outcomes) {
      if (outcome.type === 'relocated') this.#planAhead(outcome.handlers);
    }
  }

  /** Takes out of `batch` what it has dealt with, also when it throws. For a quiescent guest. */
  #relocate(batch: Prepared[], outcomes: Outcome[]): void {
    const vacancy = this.#relocator.vacancyFor(batch);
    for (let next = batch.shift(); next !== undefined; next = batch.shift()) {
      const { hot } = next;
      // Both loads of a switch may be hot.
      if (hot.state !== 'queued') continue;
      const outcome = this.#relocator.relocate(next, vacancy);
      if (outcome === 'in-use') this.#monitor.postpone(hot);
      else outcomes.push(outcome);
    }
  }

  /** What is to be relocated next. The guest need not be paused for it, and is answered in between. */
  #prepareBatch(): Prepared[] {
    const batch: Prepared[] = [];
    while (batch.length < MOST_AT_ONCE) {
      const site = this.#monitor.takeSite();
      if (site === undefined) break;
      if (batch.length > 0) this.#hypervisor.listen(0);
      const prepared = this.#relocator.prepare(site);
      if ('type' in prepared) this.#options.report(prepared);
      else batch.push(prepared);
    }
    return batch;
  }

  /**
   * Stops relocating and restores every site; handlers stay, so that a thread inside one finishes normally. The first
   * half of `unload`.
   *
   * @throws MemtablesError of the hypervisor or the journal; `UNLOAD_BLOCKED` when threads stay inside a site for longer
   *   than the option allows
   */
  disable(): void {
    this.#monitor.relocating = false;
    this.#unloader.disable(this.#options.unloadSeconds, () => this.#yieldToGuest(), this.#reportBlocked);
  }

  /**
   * Takes every change out of the guest: sites and hooked functions at once, handlers when no thread is inside.
   *
   * @throws MemtablesError `UNLOAD_BLOCKED` when threads stay inside for longer than the option allows
   */
  unload(): UnloadReport {
    this.#monitor.relocating = false;
    const report = this.#unloader.unload(
      this.#options.unloadSeconds,
      () => this.#yieldToGuest(),
      this.#reportBlocked,
    );
    this.#loaded = false;
    return report;
  }

  statistics(): Statistics {
    const monitor = this.#monitor;
    const refused: Record<string, number> = {};
    let beyondBound = 0;
    for (const { refusal, beyondBound: times } of this.#sites.all()) {
      beyondBound += times;
      if (refusal !== undefined) refused[refusal] = (refused[refusal] ?? 0) + 1;
    }
    return {
      violations: monitor.violations,
      tableLoads: monitor.tableLoads,
      relocations: new Set(this.#redirections.ofKind('relocation').map(({ label }) => label)).size,
      refused,
      staleEvents: monitor.staleEvents,
      beyondBound,
      cloakedReads: Object.fromEntries(monitor.cloakedReads),
      cloakedWrites: monitor.cloakedWrites,
      otherReads: { reads: monitor.otherReads, readers: monitor.readers.size },
      hooks: this.#redirections.ofKind('hook').length,
      trappedFrames: this.#cloaks.frames().length,
      slack: this.#slack.usage(this.#images.inUse()),
    };
  }

  loads(): LoadCounts[] {
    return [...this.#sites.all()].map(({ rip, table, hits, stale }) => ({ site: rip, table, hits, stale }));
  }

  readonly #reportBlocked = (where: readonly string[]) =>
    this.#options.report({ type: 'unload-blocked', where });

  /** Has the switches relocated that these hidden bytes make trap. The guest is answered in between. */
  #planAhead(places: readonly Place[]): void {
    if (this.#ahead === undefined) return;
    const { pages, loads } = this.#ahead.plan(places, () => this.#hypervisor.listen(0));
    if (pages.length === 0) return;
    this.#options.report({ type: 'planned', pages, switches: loads.length });
    for (const { rip, table } of loads) {
      const site = this.#sites.find(rip, table);
      if (site !== undefined) this.#monitor.plan(site);
    }
  }

  /** What the guest has written over, or unloaded, is the guest's: the redirection it belonged to is taken back. */
  #yieldToGuest(): void {
    const { writes } = this.#monitor;
    const overwritten =
      writes === 'unknown'
        ? this.#patcher.reconcileAll()
        : writes.flatMap(({ gpa, length }) => this.#patcher.reconcile(gpa, length));
    for (const change of overwritten) {
      const redirection = this.#redirections.ownerOf(change);
      if (redirection !== undefined) this.#overwritten.add(redirection);
    }
    this.#monitor.forgetWrites();
    for (const redirection of this.#unloadedModules.abandon()) {
      this.#overwritten.delete(redirection);
      this.#sites.forget(redirection);
      this.#options.report({ type: 'module-unloaded', owner: redirection.label, at: redirection.at });
    }
    // It ends in code that is the guest's no longer.
    for (const redirection of this.#overwritten) redirection.evacuation = undefined;
    this.#unloader.retire([...this.#overwritten]);
    for (const redirection of this.#overwritten) {
      this.#overwritten.delete(redirection);
      if (this.#takenBack.has(redirection)) continue;
      this.#takenBack.add(redirection);
      ignoreAll(this.#sites.replacedBy(redirection), 'overwritten-by-guest');
      this.#options.report({ type: 'taken-back', owner: redirection.label, at: redirection.at });
    }
  }
}

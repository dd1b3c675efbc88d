import { MemtablesError } from '../errors.js';
import type { Kernel } from '../nt/kernel.js';
import type { LiveRange } from '../safety/ranges.js';
import { type ScanResult, scanGuest } from '../safety/scan.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { whileQuiescent } from '../vmi/quiescence.js';
import { Evacuator } from './evacuator.js';
import { describeObstacles, type Obstacles, occupantsOf } from './obstacles.js';
import { letGuestRun } from './patience.js';
import type { Redirection, Redirections } from './redirections.js';
import type { UnloadReport } from './report.js';

/** How long the guest runs between two scans: longer each time, up to a few time slices. */
const FIRST_PAUSE_MS = 5;
const LONGEST_PAUSE_MS = 200;
/**
 * Any value inside our code blocks, as it may belong to a context that somebody is about to restore. But our code
 * calls nothing: what still lies on a stack after this long without being a RIP is left over, or a pointer of
 * something that reads the image, and may stay there for as long as its thread waits.
 */
const LEFT_OVER_AFTER_MS = 1000;

/** What can wait lets the guest run this many times as long as it stood still for the last look at its threads. */
const RUNNING_PARTS = 10;

/** Takes redirections out of the guest, once no live RIP and no stack leads into what goes away. */
export class Unloader {
  readonly #retired = new Set<Redirection>();
  #retryAt = 0;
  #retryAfter = FIRST_PAUSE_MS;
  #scans = 0;
  #blocked = 0;
  #inHandlers = 0;
  readonly #evacuator: Evacuator;

  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly kernel: Kernel,
    private readonly redirections: Redirections,
  ) {
    this.#evacuator = new Evacuator(hypervisor, kernel, redirections);
  }

  /**
   * Restores every site, waits until nothing is inside a handler or trampoline, then empties the slack.
   *
   * @param onBlocked is told what stands in the way, after each scan that was blocked
   * @throws MemtablesError `UNLOAD_BLOCKED` after `seconds`: no new thread enters a handler then, but the code of
   *   the handlers is still there, hidden for as long as the tool stays attached
   */
  unload(seconds: number, prepare: () => void, onBlocked: (places: readonly string[]) => void): UnloadReport {
    const started = performance.now();
    this.#tryUntilDone(seconds, onBlocked, () => {
      prepare();
      return this.#tryToRemoveAll(performance.now() - started < LEFT_OVER_AFTER_MS);
    });
    return {
      scans: this.#scans,
      blocked: this.#blocked,
      inHandlerAtScan: this.#inHandlers,
      evacuated: this.#evacuator.evacuated,
      seconds: (performance.now() - started) / 1000,
    };
  }

  /**
   * Restores every site and leaves the handlers: a thread inside one finishes normally.
   *
   * @throws MemtablesError `UNLOAD_BLOCKED` after `seconds` in which a thread stayed inside a site
   */
  disable(seconds: number, prepare: () => void, onBlocked: (places: readonly string[]) => void): void {
    this.#tryUntilDone(seconds, onBlocked, () => {
      prepare();
      this.#disableUndivided();
      return this.#tryToDisable(this.redirections.ofKind('relocation'));
    });
  }

  /**
   * Disables what the guest has written over: at once, or as soon as nothing stands inside. Until then it is whole
   * again, and what the guest wrote is seen but not executed. For a quiescent guest.
   *
   * @throws MemtablesError of the hypervisor or the journal; call it again then
   */
  retire(redirections: readonly Redirection[]): void {
    const divided = new Set<Redirection>();
    for (const redirection of redirections) {
      // What a hook has put there is one instruction.
      const isUndivided = redirection.kind === 'hook' || redirection.interior === undefined;
      if (isUndivided || this.redirections.isWhollyOverwritten(redirection)) {
        this.redirections.disable(redirection);
      } else divided.add(redirection);
    }
    for (const redirection of divided) this.#retired.add(redirection);
    this.#tryToDisable(divided);
    for (const redirection of divided) {
      if (redirection.jump !== undefined) this.redirections.reassert(redirection);
    }
  }

  /** True when it is time to try again to disable what was retired. */
  get hasWork(): boolean {
    return this.#retired.size > 0 && performance.now() >= this.#retryAt;
  }

  /**
   * Disables what was retired, and takes out the code of what was disabled earlier and frees its slack, as far as
   * nothing stands inside now. Does nothing while the last try is not long ago. For a quiescent guest.
   */
  tidyUp(): void {
    const started = performance.now();
    const disabled = this.redirections.disabled();
    if (started < this.#retryAt || (this.#retired.size === 0 && disabled.length === 0)) return;
    this.#tryToDisable(this.#retired);
    for (const redirection of this.#retired) {
      if (redirection.jump === undefined) this.#retired.delete(redirection);
    }
    this.#tryToRemove(disabled);
    const now = performance.now();
    this.#retryAt = now + Math.max(this.#retryAfter, RUNNING_PARTS * (now - started));
    this.#retryAfter = this.#retired.size === 0 ? FIRST_PAUSE_MS : nextPause(this.#retryAfter);
  }

  #tryToRemove(disabled: readonly Redirection[]): void {
    if (disabled.length === 0) return;
    const ranges = this.redirections.codeRanges(disabled);
    if (scanGuest(this.hypervisor, this.kernel, ranges).verdict !== 'safe') return;
    for (const redirection of disabled) this.redirections.remove(redirection);
  }

  /** Tries until nothing stands in the way any more, and lets the guest run in between. */
  #tryUntilDone(
    seconds: number,
    onBlocked: (places: readonly string[]) => void,
    attempt: () => Obstacles | undefined,
  ): void {
    const started = performance.now();
    for (let pause = FIRST_PAUSE_MS; ; pause = nextPause(pause)) {
      const obstacles = whileQuiescent(this.hypervisor, attempt);
      if (obstacles === undefined) return;
      const places = describeObstacles(obstacles);
      onBlocked(places);
      if (performance.now() - started > seconds * 1000) {
        throw new MemtablesError(
          'UNLOAD_BLOCKED',
          'threads stayed inside the handlers; the guest still holds them',
          {
            remedy:
              'What nothing stood in is restored: attach again later, or restart the guest; the journal lists what is left.',
            context: { seconds, scans: this.#scans, places },
          },
        );
      }
      letGuestRun(this.hypervisor, pause);
    }
  }

  /** Of the relocations: inside one instruction no thread stands. */
  #disableUndivided(): void {
    for (const relocation of this.redirections.ofKind('relocation')) {
      if (relocation.interior === undefined) this.redirections.disable(relocation);
    }
  }

  /** Disables those inside which nothing stands; returns what stands in the way of the others. */
  #tryToDisable(redirections: Iterable<Redirection>): Obstacles | undefined {
    const entries = this.redirections.entryRanges(redirections);
    if (entries.length === 0) return undefined;
    const obstacles = occupantsOf(this.hypervisor, this.kernel, entries);
    if (obstacles.unsettled.length > 0) return obstacles;
    const occupied = new Set(obstacles.findings.map(({ range }) => range));
    for (const redirection of redirections) {
      if (!occupied.has(redirection.interior!)) this.redirections.disable(redirection);
    }
    return occupied.size > 0 ? obstacles : undefined;
  }

  /** Returns what stands in the way, if anything does. */
  #tryToRemoveAll(patient: boolean): Obstacles | undefined {
    this.#disableUndivided();
    this.#evacuator.evacuateVcpus();
    const all = this.redirections.all();
    const entries = this.redirections.entryRanges(all);
    const code = this.redirections.codeRanges(all);
    const ranges = [...entries, ...code];
    let scan = this.#scan(ranges);
    if (this.#evacuator.evacuateThreads(scan)) scan = this.#scan(ranges);
    const { unsettled } = scan;
    const findings = scan.findings.filter(
      (finding) => finding.isRip || (patient && !this.#evacuator.isLeftBehind(finding)),
    );
    const occupied = new Set(findings.map(({ range }) => range));
    for (const redirection of all) {
      if (redirection.interior === undefined || occupied.has(redirection.interior)) continue;
      // What cannot be looked at keeps no hook in place: nothing executes the bytes behind its jump.
      const isCertain = unsettled.length === 0 || (redirection.kind === 'hook' && !patient);
      if (isCertain) this.redirections.disable(redirection);
    }
    if (findings.length > 0 || unsettled.length > 0) {
      this.#blocked++;
      return { findings, unsettled };
    }
    for (const redirection of all) this.redirections.remove(redirection);
    return undefined;
  }

  #scan(ranges: readonly LiveRange[]): ScanResult {
    const scan = scanGuest(this.hypervisor, this.kernel, ranges);
    this.#scans++;
    this.#inHandlers += scan.findings.length;
    return scan;
  }
}

function nextPause(pause: number): number {
  return Math.min(pause * 2, LONGEST_PAUSE_MS);
}

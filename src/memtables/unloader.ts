import { MemtablesError } from '../errors.js';
import type { Kernel } from '../nt/kernel.js';
import type { LiveRange } from '../safety/ranges.js';
import { type ScanResult, scanGuest } from '../safety/scan.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { whileQuiescent } from '../vmi/quiescence.js';
import { Evacuator } from './evacuator.js';
import { describeObstacles, type Obstacles } from './obstacles.js';
import { letGuestRun } from './patience.js';
import type { Redirections } from './redirections.js';
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

/** Takes redirections out of the guest, once no live RIP and no stack leads into what goes away. */
export class Unloader {
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
    let pause = FIRST_PAUSE_MS;
    for (;;) {
      const patient = performance.now() - started < LEFT_OVER_AFTER_MS;
      const obstacles = whileQuiescent(this.hypervisor, () => {
        prepare();
        return this.#tryRemoveAll(patient);
      });
      if (obstacles === undefined) break;
      const places = describeObstacles(obstacles);
      onBlocked(places);
      if (performance.now() - started > seconds * 1000) {
        throw new MemtablesError(
          'UNLOAD_BLOCKED',
          'threads stayed inside the handlers; the guest still holds them',
          {
            remedy:
              'The sites are restored: attach again later, or restart the guest; the journal lists what is left.',
            context: { seconds, scans: this.#scans, places },
          },
        );
      }
      letGuestRun(this.hypervisor, pause);
      pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
    }
    return {
      scans: this.#scans,
      blocked: this.#blocked,
      inHandlerAtScan: this.#inHandlers,
      evacuated: this.#evacuator.evacuated,
      seconds: (performance.now() - started) / 1000,
    };
  }

  /** Restores every site and leaves the handlers: a thread inside one finishes normally. For a quiescent guest. */
  disable(): void {
    for (const relocation of this.redirections.ofKind('relocation')) this.redirections.disable(relocation);
  }

  /**
   * Takes out the code of what was disabled earlier, and frees its slack, unless something is inside it now. For a
   * quiescent guest.
   */
  removeDisabled(): void {
    const disabled = this.redirections.disabled();
    if (disabled.length === 0) return;
    const { findings, unsettled } = scanGuest(
      this.hypervisor,
      this.kernel,
      this.redirections.codeRanges(disabled),
    );
    if (findings.length > 0 || unsettled.length > 0) return;
    for (const redirection of disabled) this.redirections.remove(redirection);
  }

  /** Returns what stands in the way, if anything does. */
  #tryRemoveAll(patient: boolean): Obstacles | undefined {
    this.disable();
    this.#evacuator.evacuateVcpus();
    const entries = this.redirections.entryRanges();
    const code = this.redirections.codeRanges(this.redirections.all());
    const ranges = [...entries, ...code];
    let scan = this.#scan(ranges);
    if (this.#evacuator.evacuateThreads(scan)) scan = this.#scan(ranges);
    const { unsettled } = scan;
    const findings = scan.findings.filter(
      (finding) => finding.isRip || (patient && !this.#evacuator.isLeftBehind(finding)),
    );
    const occupied = new Set(findings.map(({ range }) => range));
    // What cannot be looked at keeps handlers in place, but no hook: nothing executes the bytes behind its jump.
    if ((unsettled.length === 0 || !patient) && !entries.some((range) => occupied.has(range))) {
      for (const hook of this.redirections.ofKind('hook')) this.redirections.disable(hook);
    }
    if (findings.length > 0 || unsettled.length > 0) {
      this.#blocked++;
      return { findings, unsettled };
    }
    for (const redirection of this.redirections.all()) this.redirections.remove(redirection);
    return undefined;
  }

  #scan(ranges: readonly LiveRange[]): ScanResult {
    const scan = scanGuest(this.hypervisor, this.kernel, ranges);
    this.#scans++;
    this.#inHandlers += scan.findings.length;
    return scan;
  }
}

import type { Kernel } from '../nt/kernel.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import type { CodeChange, Patcher } from './patcher.js';
import type { Redirection, Redirections } from './redirections.js';

/** How long what we have changed in a module may be gone before it is noticed. */
const CHECK_INTERVAL_MS = 250;

/**
 * Notices when the guest has unloaded a module that holds a change of ours: its frames are somebody else's then, and
 * nothing is written there or answered for them any more.
 */
export class UnloadedModules {
  #checkedAt = Number.NEGATIVE_INFINITY;

  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly nt: Kernel,
    private readonly patcher: Patcher,
    private readonly redirections: Redirections,
  ) {}

  /** True when changes in modules, if there are any, have not been looked at for a while. */
  get isCheckDue(): boolean {
    return performance.now() - this.#checkedAt >= CHECK_INTERVAL_MS;
  }

  /** Whether a change is gone. Needs no pause, and is sure only with one. */
  hasLost(): boolean {
    this.#checkedAt = performance.now();
    const inModules = this.#inModules();
    if (inModules.length > 0) this.hypervisor.flushCaches();
    return inModules.some((redirection) => this.#isLost(redirection));
  }

  /** Gives up every redirection of which something is gone, and returns them. For a quiescent guest. */
  abandon(): Redirection[] {
    const lost = this.#inModules().filter((redirection) => this.#isLost(redirection));
    for (const redirection of lost) {
      this.redirections.abandon(redirection, this.#isChangeLost(redirection.code));
    }
    return lost;
  }

  #inModules(): Redirection[] {
    const isInNt = ({ at, slack }: Redirection) => this.nt.contains(at) && this.nt.contains(slack.gva);
    return this.redirections.all().filter((redirection) => !isInNt(redirection));
  }

  #isLost({ jump, code }: Redirection): boolean {
    return (jump !== undefined && this.#isChangeLost(jump)) || this.#isChangeLost(code);
  }

  #isChangeLost(change: CodeChange): boolean {
    return !this.nt.contains(change.patch.gva) && !this.patcher.isInPlace(change);
  }
}

import type { Machine } from '../machine/machine.js';
import type { Introspection } from './introspection.js';

/** How long the guest runs where nothing comes in: a timer of this process may be late by as much. */
const SLICE_MICROSECONDS = 1000;
/** An idle guest is looked at again this often: its timer may be due. */
const IDLE_MS = 1;

/** Runs the guest in slices on this thread, and lets the sockets have their turn in between. */
export class RunLoop {
  private immediate: NodeJS.Immediate | undefined;
  private timeout: NodeJS.Timeout | undefined;
  private stopped = false;

  constructor(
    private readonly machine: Machine,
    private readonly introspection: Introspection,
    /** Told what `run` threw; the loop has stopped then. */
    private readonly onFailure: (error: unknown) => void,
  ) {
    this.schedule();
  }

  /** Something came in that may let a vCPU run. */
  wake(): void {
    this.schedule();
  }

  stop(): void {
    this.stopped = true;
    clearImmediate(this.immediate);
    clearTimeout(this.timeout);
  }

  private schedule(): void {
    if (this.stopped || this.immediate) return;
    clearTimeout(this.timeout);
    this.immediate = setImmediate(() => this.turn());
  }

  private turn(): void {
    this.immediate = undefined;
    // Nothing can run before the tool answers: leave the thread to the socket.
    if (this.introspection.blocked) return;
    try {
      const { traps, idle } = this.machine.run(SLICE_MICROSECONDS, true);
      this.introspection.trapped(traps);
      if (idle && traps.length === 0) this.timeout = setTimeout(() => this.schedule(), IDLE_MS);
      else this.schedule();
    } catch (error) {
      this.stop();
      this.onFailure(error);
    }
  }
}

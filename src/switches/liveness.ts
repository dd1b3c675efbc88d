import type { GprName } from '../x86/registers.js';

/** What a piece of code may read of what was there when control came to it. */
export interface Liveness {
  readonly registers: ReadonlySet<GprName>;
  /** Any of the status flags. */
  readonly flags: boolean;
}

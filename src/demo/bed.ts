import type { Attachment, AttachOptions } from '../attachment/attachment.js';
import type { GuestStatistics } from '../host/statistics.js';
import type { SiteViolations } from '../host/violation-counters.js';

/** What is known of a bed's guest at one moment. */
export interface BedStatistics {
  readonly uptimeMs: number;
  readonly violations: { readonly sites: readonly SiteViolations[] };
  /** Absent until the guest has booted so far. */
  readonly guest?: GuestStatistics;
}

/** Where the main job is done: a hypervisor that runs the guest, and a look at that guest past the tool. */
export interface Bed {
  /** How the guest is attached to. */
  readonly target: Pick<AttachOptions, 'name' | 'socket'>;
  /** @param attachment where nobody but the tool itself can count what it traps */
  statistics(attachment: Attachment): Promise<BedStatistics>;
  /** The bytes of the guest's images that must be as before: headers, non-writable sections and slack. */
  image(): Promise<Buffer>;
}

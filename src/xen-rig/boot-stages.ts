import { STAGE_MARK } from './dom0-init.js';

/** What the console has told of the hypervisor so far. */
export interface BootFacts {
  /** As `xen-4.17.1`. */
  hypervisor?: string;
  /** Xen uses EPT for its guests. */
  ept: boolean;
}

interface Stage {
  readonly pattern: RegExp;
  readonly text: string;
}

const STAGES: readonly Stage[] = [
  { pattern: /loading xen/, text: 'GRUB loads Xen' },
  { pattern: /loading dom0/, text: 'GRUB loads dom0' },
  { pattern: /^\(XEN\) Xen version /, text: 'Xen starts' },
  { pattern: /about to get started/, text: "dom0's kernel starts" },
  { pattern: new RegExp(`^${STAGE_MARK}init`), text: 'dom0 has booted' },
  { pattern: new RegExp(`^${STAGE_MARK}xenstored`), text: 'xenstored runs' },
  { pattern: new RegExp(`^${STAGE_MARK}node$`), text: 'Node starts' },
];

/** Recognises, line by line, how far the boot has come. */
export class BootStages {
  readonly facts: BootFacts = { ept: false };
  readonly #left = [...STAGES];

  /** The stage that the line tells of; each once. */
  recognise(line: string): string | undefined {
    const version = /^\(XEN\) Xen version (\S+)/.exec(line);
    if (version !== null) this.facts.hypervisor = `xen-${version[1]}`;
    if (/^\(XEN\) .*Extended Page Tables \(EPT\)/.test(line)) this.facts.ept = true;
    const index = this.#left.findIndex(({ pattern }) => pattern.test(line));
    // One whose line got lost does not come after a later one.
    return index === -1 ? undefined : this.#left.splice(0, index + 1).at(-1)!.text;
  }
}

import type { SwitchForm, SwitchSite } from '../guest/artefacts.js';
import type { Machine, Trap } from '../machine/machine.js';
import { type Gva, hex, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import { accessForm } from './access-form.js';
import type { IntrospectionObserver, Outcome } from './introspection.js';
import { translate } from './page-walk.js';

/** What one table load of the workload has trapped. Times in milliseconds since the host started. */
export interface SiteViolations {
  readonly site: string;
  readonly form: SwitchForm;
  /** `dword` for the load of the entry, `byte` for the index load of a two-level switch. */
  readonly load: 'dword' | 'byte';
  readonly expected: SwitchSite['expected'];
  /** As `0x…`. */
  readonly rip: string;
  readonly violations: number;
  /** Of these: answered after the tool had replaced the bytes that had been decoded at the trap. */
  readonly stale: number;
  readonly firstMs?: number;
  readonly lastMs?: number;
  readonly lastStaleMs?: number;
}

export interface ViolationReport {
  readonly read: number;
  readonly write: number;
  readonly execute: number;
  /** Reads by an instruction that is no table load of the workload. */
  readonly otherReads: number;
  /** Stale events, at a site or not. */
  readonly stale: number;
  /** Reads answered with the tool's bytes, by width in bytes or by string instruction. */
  readonly substituted: Readonly<Record<string, number>>;
  /** Sites that have trapped at least once. */
  readonly sites: readonly SiteViolations[];
}

/** The table loads of an image of the guest, and where that lies. */
export interface WatchedImage {
  readonly base: Gva;
  readonly sites: readonly SwitchSite[];
}

type Counter = { -readonly [K in keyof SiteViolations]: SiteViolations[K] };

/** Counts what the introspection traps. The counts only ever grow. */
export class ViolationCounters implements IntrospectionObserver {
  private readonly byAccess = { read: 0, write: 0, execute: 0 };
  private otherReads = 0;
  private stale = 0;
  private readonly substituted = new Map<string, number>();
  private readonly sites = new Map<Gva, Counter>();
  private writes = 0;
  /** How many writes the tool had made when each vCPU's open violation trapped. */
  private readonly writesAtTrap: number[];

  constructor(
    private readonly machine: Machine,
    images: readonly WatchedImage[],
    /** Milliseconds since the host started. */
    private readonly now: () => number,
  ) {
    this.writesAtTrap = new Array(machine.vcpuCount).fill(0);
    for (const { base, sites } of images) {
      for (const site of sites) {
        this.watch(site, 'dword', base + BigInt(site.loadRva));
        if (site.byteLoadRva !== undefined) this.watch(site, 'byte', base + BigInt(site.byteLoadRva));
      }
    }
  }

  private watch(site: SwitchSite, load: Counter['load'], rip: Gva): void {
    const { name, form, expected } = site;
    this.sites.set(rip, { site: name, form, load, expected, rip: hex(rip), violations: 0, stale: 0 });
  }

  raised(trap: Trap): void {
    this.byAccess[trap.access]++;
    this.writesAtTrap[trap.vcpu] = this.writes;
    if (trap.access !== 'read') return;
    const site = this.sites.get(trap.rip);
    if (!site) {
      this.otherReads++;
      return;
    }
    site.violations++;
    site.lastMs = this.now();
    site.firstMs ??= site.lastMs;
  }

  answered(trap: Trap, outcome: Outcome): void {
    if (outcome === 'substituted') {
      const form = accessForm(trap.instruction);
      this.substituted.set(form, (this.substituted.get(form) ?? 0) + 1);
    }
    // Only the tool's writes can make an event stale: without one, its bytes need not be compared.
    if (this.writes === this.writesAtTrap[trap.vcpu] || !this.instructionReplaced(trap)) return;
    this.stale++;
    const site = trap.access === 'read' ? this.sites.get(trap.rip) : undefined;
    if (!site) return;
    site.stale++;
    site.lastStaleMs = this.now();
  }

  written(): void {
    this.writes++;
  }

  report(): ViolationReport {
    return {
      ...this.byAccess,
      otherReads: this.otherReads,
      stale: this.stale,
      substituted: Object.fromEntries(this.substituted),
      sites: [...this.sites.values()].filter((site) => site.violations > 0),
    };
  }

  private instructionReplaced(trap: Trap): boolean {
    const { cr3 } = this.machine.registers(trap.vcpu);
    for (let done = 0; done < trap.instruction.length; ) {
      const rip = trap.rip + BigInt(done);
      const gpa = translate(this.machine, cr3, rip);
      if (gpa === undefined) return true;
      const piece = Math.min(PAGE_SIZE - pageOffset(rip), trap.instruction.length - done);
      const now = this.machine.readPhysical(gpa, piece);
      if (!now.equals(trap.instruction.subarray(done, done + piece))) return true;
      done += piece;
    }
    return false;
  }
}

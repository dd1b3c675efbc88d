import type { Attachment } from '../attachment/attachment.js';
import type { Bed, BedStatistics } from '../demo/bed.js';
import type { GuestArtefacts } from '../guest/artefacts.js';
import type { LoadedGuest } from '../guest/loader.js';
import { type PhysicalMemory, readGuestReport } from '../guest/report.js';
import { snapshotImages } from '../host/image-snapshot.js';
import { guestStatistics } from '../host/statistics.js';
import type { SiteViolations } from '../host/violation-counters.js';
import type { LoadCounts } from '../memtables/report.js';
import { PeImage } from '../nt/pe.js';
import { type Gva, hex } from '../vmi/address.js';

type Load = Pick<SiteViolations, 'site' | 'form' | 'load' | 'expected'>;

/** The guest as a Xen domain. Its memory is read past the tool; what traps, only the tool can count. */
export class XenBed implements Bed {
  readonly target: Bed['target'];
  readonly #loads: ReadonlyMap<Gva, Load>;
  #counts: readonly LoadCounts[] = [];

  constructor(
    name: string,
    private readonly memory: PhysicalMemory,
    private readonly guest: LoadedGuest,
    private readonly artefacts: Pick<GuestArtefacts, 'image' | 'sites' | 'pvh'>,
  ) {
    this.target = { name };
    this.#loads = new Map(loadsOf(guest.kernelBase, artefacts.sites));
  }

  /** True once the guest's own report is there. */
  get hasBooted(): boolean {
    return readGuestReport(this.memory, this.guest) !== undefined;
  }

  /** After the unload, what traps is what it was at the last look before. */
  async statistics(attachment: Attachment): Promise<BedStatistics> {
    this.#counts = await attachment.loads().catch(() => this.#counts);
    const report = readGuestReport(this.memory, this.guest);
    return {
      uptimeMs: Math.round(performance.now()),
      violations: { sites: this.#counts.flatMap((counts) => this.#violations(counts)) },
      ...(report && { guest: guestStatistics(report) }),
    };
  }

  async image(): Promise<Buffer> {
    const { image, pvh } = this.artefacts;
    const snapshot = snapshotImages(this.memory, this.guest, {
      kernel: PeImage.fromFile(image),
      hal: PeImage.fromFile(pvh.hal),
      module: undefined,
    });
    return Buffer.from(JSON.stringify(snapshot));
  }

  #violations({ site, hits, stale }: LoadCounts): SiteViolations[] {
    const load = this.#loads.get(site);
    if (load === undefined) return [];
    // No more than one on each vCPU can have been under way when its load was relocated.
    const underWay = Math.min(stale, this.guest.vcpuCount);
    return [{ ...load, rip: hex(site), violations: hits + stale, stale: underWay }];
  }
}

function* loadsOf(base: Gva, { sites }: GuestArtefacts['sites']): Generator<[Gva, Load]> {
  for (const { name, form, expected, loadRva, byteLoadRva } of sites) {
    const site = { site: name, form, expected };
    yield [base + BigInt(loadRva), { ...site, load: 'dword' }];
    if (byteLoadRva !== undefined) yield [base + BigInt(byteLoadRva), { ...site, load: 'byte' }];
  }
}

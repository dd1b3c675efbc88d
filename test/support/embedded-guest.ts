import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { onTestFinished } from 'vitest';
import { type GuestArtefacts, readGuestArtefacts } from '../../src/guest/artefacts.js';
import { type LoadedGuest, loadGuest } from '../../src/guest/loader.js';
import { type GuestReport, readGuestReport } from '../../src/guest/report.js';
import { predictChecksum } from '../../src/guest/workload-model.js';
import type { HandlerChoice } from '../../src/handlers/planner.js';
import { snapshotImages } from '../../src/host/image-snapshot.js';
import { Journal } from '../../src/journal/journal.js';
import { createMachine } from '../../src/machine/create-machine.js';
import type { Machine } from '../../src/machine/machine.js';
import { Engine } from '../../src/memtables/engine.js';
import type { EngineEvent } from '../../src/memtables/report.js';
import { discoverKernel, type Kernel } from '../../src/nt/kernel.js';
import { PeImage, type Section } from '../../src/nt/pe.js';
import { loadProfile } from '../../src/nt/profile.js';
import { type Gpa, type Gva, PAGE_SIZE } from '../../src/vmi/address.js';
import type { Hypervisor } from '../../src/vmi/hypervisor.js';
import { whileQuiescent } from '../../src/vmi/quiescence.js';
import { MachineHypervisor } from './machine-hypervisor.js';

const MEMORY_BYTES = 64 << 20;
export const TIMER_VECTOR = 0xd1;
const TIMER_MICROSECONDS = 1000;
const BOOT_RUNS = 20_000;
const PTE_PRESENT = 1n;
const PTE_WRITABLE = 2n;
const PTE_FRAME = 0x000f_ffff_ffff_f000n;

interface BootOptions {
  readonly vcpus?: number;
  readonly seed?: number;
  readonly text?: Uint8Array;
}

/** A booted guest on the embedded machine, in this process. */
export class EmbeddedGuest {
  readonly artefacts: GuestArtefacts;
  readonly machine: Machine;
  readonly loaded: LoadedGuest;
  readonly hypervisor: MachineHypervisor;

  private constructor(vcpus: number, seed: number, text: Uint8Array | undefined) {
    this.artefacts = readGuestArtefacts();
    this.machine = createMachine({ vcpus, memoryBytes: MEMORY_BYTES });
    const { image, hal, module } = this.artefacts;
    this.loaded = loadGuest(this.machine, {
      image,
      hal,
      seed,
      ...(module && text && { module: { ...module, text } }),
    });
    this.hypervisor = new MachineHypervisor(this.machine);
  }

  /** Boots, and runs until every part of the workload has begun. Without a text for its lexer it has no module. */
  static boot({ vcpus = 2, seed = 1, text }: BootOptions = {}): EmbeddedGuest {
    const guest = new EmbeddedGuest(vcpus, seed, text);
    onTestFinished(() => guest.machine.close());
    guest.startTimer();
    for (let run = 0; run < BOOT_RUNS; run++) {
      guest.machine.run(1000);
      const report = readGuestReport(guest.machine, guest.loaded);
      if (report !== undefined && report.integrity.sweeps > 0n) return guest;
    }
    throw new Error('the guest did not boot');
  }

  startTimer(): void {
    this.machine.setTimer(TIMER_VECTOR, TIMER_MICROSECONDS);
  }

  /** From now on nothing but `step` lets the guest run. */
  stopTimer(): void {
    this.machine.setTimer(TIMER_VECTOR, 0);
  }

  /** Makes a vCPU take the timer interrupt as soon as it can. */
  tick(vcpu: number): void {
    this.machine.raiseInterrupt(vcpu, TIMER_VECTOR);
  }

  report(): GuestReport {
    const report = readGuestReport(this.machine, this.loaded);
    if (report === undefined) throw new Error('the guest has not booted');
    return report;
  }

  /** Streams of the workload whose checksum is not what the model predicts. */
  wrongStreams(): unknown[] {
    return this.report().streams.filter(({ form, seed, count, checksum }) => {
      return predictChecksum(this.artefacts.sites.calls, form, seed, count) !== checksum;
    });
  }

  /** The section of the kernel image with this name. */
  peSection(name: string): Section {
    const section = PeImage.fromFile(this.artefacts.image).sections.find((each) => each.name === name);
    if (section === undefined) throw new Error(`the guest has no section ${name}`);
    return section;
  }

  /** Writes a byte to the end of the page behind each section, as anybody may: a tool finds no slack then. */
  spoilSlack(names: readonly ('nt' | 'hal')[] = ['nt', 'hal']): void {
    const { artefacts, loaded } = this;
    const images = {
      nt: { file: artefacts.image, base: loaded.kernelBase },
      hal: { file: artefacts.hal, base: loaded.hal.base },
    };
    for (const { file, base } of names.map((name) => images[name])) {
      for (const { rva, virtualSize } of PeImage.fromFile(file).sections) {
        const pageEnd = Math.ceil((rva + virtualSize) / PAGE_SIZE) * PAGE_SIZE;
        const gpa = this.loaded.translate(base + BigInt(pageEnd - 1));
        if (gpa !== undefined) this.machine.writePhysical(gpa, Buffer.from([1]));
      }
    }
  }

  /** Lets the kernel write to a read-only page, as a driver that patches code does. */
  makeWritable(gva: Gva): void {
    this.#changeEntry(gva, (entry) => entry | PTE_WRITABLE);
  }

  /** Takes a page out of memory, as the pager does; returns how to bring it back. */
  unmap(gva: Gva): () => void {
    this.#changeEntry(gva, (entry) => entry & ~PTE_PRESENT);
    return () => this.#changeEntry(gva, (entry) => entry | PTE_PRESENT);
  }

  /** Changes the page's entry in the System process's page table. */
  #changeEntry(gva: Gva, change: (entry: bigint) => bigint): void {
    const entryAt = (table: Gpa, shift: bigint) => table + ((gva >> shift) & 0x1ffn) * 8n;
    let table = this.loaded.directoryTable;
    for (const shift of [39n, 30n, 21n]) {
      const entry = this.machine.readPhysical(entryAt(table, shift), 8).readBigUInt64LE();
      table = entry & PTE_FRAME;
    }
    const entry = this.machine.readPhysical(entryAt(table, 12n), 8);
    entry.writeBigUInt64LE(change(entry.readBigUInt64LE()));
    this.machine.writePhysical(entryAt(table, 12n), entry);
    // In place of an INVLPG.
    for (let vcpu = 0; vcpu < this.machine.vcpuCount; vcpu++) {
      this.machine.setRegisters(vcpu, { cr3: this.machine.registers(vcpu).cr3 });
    }
  }

  /** The kernel, found as the tool finds it. */
  discover(hypervisor: Hypervisor = this.hypervisor): Kernel {
    return whileQuiescent(hypervisor, () =>
      discoverKernel(hypervisor, loadProfile(this.artefacts.profilePath)),
    );
  }

  /** The bytes that must be as they were after an unload. */
  image(): string {
    const { image, hal, module } = this.artefacts;
    return JSON.stringify(
      snapshotImages(this.machine, this.loaded, {
        kernel: PeImage.fromFile(image),
        hal: PeImage.fromFile(hal),
        module: module && PeImage.fromFile(module.image),
      }),
    );
  }

  /** An engine on this guest, with what it reports. */
  attach(
    options: {
      hypervisor?: Hypervisor;
      kernel?: Kernel;
      threshold?: number;
      handler?: HandlerChoice;
      ahead?: boolean;
      unloadSeconds?: number;
    } = {},
  ) {
    const {
      hypervisor = this.hypervisor,
      threshold = 50,
      handler = 'auto',
      ahead = false,
      unloadSeconds = 20,
    } = options;
    const directory = mkdtempSync(join(tmpdir(), 'engine-'));
    onTestFinished(() => rmSync(directory, { recursive: true }));
    const { kernel = this.discover(hypervisor) } = options;
    const journal = Journal.create(
      join(directory, 'journal'),
      { guest: 'embedded', kernelBase: kernel.base, pdb: 'x' },
      () => true,
    );
    const events: EngineEvent[] = [];
    const engine = new Engine(hypervisor, kernel, journal, {
      threshold,
      handler,
      ahead,
      unloadSeconds,
      report: (event) => events.push(event),
    });
    return { engine, kernel, journal, events };
  }
}

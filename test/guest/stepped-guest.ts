import { onTestFinished } from 'vitest';
import { type GuestArtefacts, readGuestArtefacts } from '../../src/guest/artefacts.js';
import { type LoadedGuest, loadGuest } from '../../src/guest/loader.js';
import { type GuestReport, readGuestReport } from '../../src/guest/report.js';
import { createMachine } from '../../src/machine/create-machine.js';
import type { Machine, Trap } from '../../src/machine/machine.js';
import { loadProfile, type Profile } from '../../src/nt/profile.js';
import { type Gva, PAGE_SIZE, pageOffset } from '../../src/vmi/address.js';
import { MachineHypervisor } from '../support/machine-hypervisor.js';

export const CLOCK_VECTOR = 0xd1;
const MEGABYTE = 1 << 20;
const INSTRUCTIONS_PER_TICK = 2000;
/** Several times what a sweep of the integrity checker takes. */
const MAX_ROUNDS = 2000;

export interface SteppedOptions {
  readonly vcpus?: number;
  readonly seed?: number;
  readonly memoryMB?: number;
  /** What the lexer of the module is to read; without it the guest has no module. */
  readonly text?: Uint8Array;
  readonly simpleReads?: boolean;
}

/** The guest on the embedded machine, stepped: what it does depends on the seed alone, not on the clock. */
export class SteppedGuest {
  readonly artefacts: GuestArtefacts;
  readonly machine: Machine;
  readonly loaded: LoadedGuest;
  readonly hypervisor: MachineHypervisor;
  readonly profile: Profile;
  /** Traps that `round` came upon, each completed on memory. */
  onTrap: (trap: Trap) => void = () => {};

  constructor({ vcpus = 2, seed = 1, memoryMB = 64, text, simpleReads = false }: SteppedOptions = {}) {
    this.artefacts = readGuestArtefacts();
    this.profile = loadProfile(this.artefacts.profilePath);
    this.machine = createMachine({ vcpus, memoryBytes: memoryMB * MEGABYTE });
    onTestFinished(() => this.machine.close());
    const { image, hal, module } = this.artefacts;
    this.loaded = loadGuest(this.machine, {
      image,
      hal,
      seed,
      simpleReads,
      ...(module && text && { module: { ...module, text } }),
    });
    this.hypervisor = new MachineHypervisor(this.machine);
  }

  /** A guest whose integrity checker has been through once: every part of the workload has run. */
  static boot(options?: SteppedOptions): SteppedGuest {
    const guest = new SteppedGuest(options);
    guest.sweep();
    return guest;
  }

  /** Runs every vCPU for the length of a clock tick, and ticks. */
  round(instructions = INSTRUCTIONS_PER_TICK): void {
    for (let vcpu = 0; vcpu < this.machine.vcpuCount; vcpu++) {
      this.step(vcpu, instructions);
      this.tick(vcpu);
    }
  }

  /** Runs one vCPU; traps on the way are completed. */
  step(vcpu: number, instructions: number): void {
    for (let left = instructions; ; ) {
      const { retired, trap } = this.machine.step(vcpu, left);
      if (trap === undefined) return;
      this.onTrap(trap);
      this.machine.complete(vcpu);
      left = Math.max(left - retired - 1, 0);
    }
  }

  /** Makes a vCPU take the clock interrupt as soon as it can. */
  tick(vcpu: number): void {
    this.machine.raiseInterrupt(vcpu, CLOCK_VECTOR);
  }

  /** Runs rounds until the condition holds. */
  until(condition: (report: GuestReport) => boolean, what: string): void {
    for (let round = 0; round < MAX_ROUNDS; round++) {
      this.round();
      const report = readGuestReport(this.machine, this.loaded);
      if (report !== undefined && condition(report)) return;
    }
    throw new Error(`the guest does not come to ${what}`);
  }

  /** Runs until the integrity checker has been through everything `times` more times. */
  sweep(times = 1): void {
    for (let sweep = 0; sweep < times; sweep++) {
      const before = readGuestReport(this.machine, this.loaded)?.integrity.sweeps ?? 0n;
      this.until(({ integrity }) => integrity.sweeps > before, 'the end of a sweep');
    }
  }

  report(): GuestReport {
    const report = readGuestReport(this.machine, this.loaded);
    if (report === undefined) throw new Error('the guest has not booted');
    return report;
  }

  /** The address of a symbol of the profile. */
  symbol(name: string): Gva {
    return this.loaded.kernelBase + BigInt(this.profile.symbol(name));
  }

  /** Of kernel memory; may cross pages. */
  read(gva: Gva, length: number): Buffer {
    const bytes = Buffer.alloc(length);
    for (const { at, done, piece } of pieces(gva, length)) {
      bytes.set(this.machine.readPhysical(this.#translate(at), piece), done);
    }
    return bytes;
  }

  write(gva: Gva, bytes: Uint8Array): void {
    for (const { at, done, piece } of pieces(gva, bytes.length)) {
      this.machine.writePhysical(this.#translate(at), bytes.subarray(done, done + piece));
    }
  }

  readU64(gva: Gva): bigint {
    return this.read(gva, 8).readBigUInt64LE();
  }

  #translate(gva: Gva): bigint {
    const gpa = this.loaded.translate(gva);
    if (gpa === undefined) throw new Error(`nothing is mapped at ${gva.toString(16)}`);
    return gpa;
  }
}

function* pieces(gva: Gva, length: number): Generator<{ at: Gva; done: number; piece: number }> {
  for (let done = 0; done < length; ) {
    const at = gva + BigInt(done);
    const piece = Math.min(PAGE_SIZE - pageOffset(at), length - done);
    yield { at, done, piece };
    done += piece;
  }
}

// The embedded guest with a driver that its workload runs in: a copy of its kernel's image at another place, in the
// list of loaded modules.
import { createHash } from 'node:crypto';
import { BOOT_BLOCK } from '../../src/guest/loader.js';
import type { Kernel } from '../../src/nt/kernel.js';
import { PeImage } from '../../src/nt/pe.js';
import { type Gpa, type Gva, gpaOfFrame, PAGE_SIZE, pageBase } from '../../src/vmi/address.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';

export const DRIVER = 'driver.sys';
const PAGE = BigInt(PAGE_SIZE);
const PRESENT = 1n;
const WRITABLE = 2n;
const FRAME = 0x000f_ffff_ffff_f000n;
const ENTRIES = 512;
const LIST = 'PsLoadedModuleList';
const TYPE = '_KLDR_DATA_TABLE_ENTRY';
const FIELDS: Readonly<Record<string, number>> = {
  InLoadOrderLinks: 0,
  DllBase: 0x30,
  SizeOfImage: 0x40,
  BaseDllName: 0x58,
};

interface Options {
  readonly vcpus?: number;
  readonly seed?: number;
  /** From NT's base to the driver's. */
  readonly distance?: bigint;
}

export type DriverGuest = ReturnType<typeof guestWithDriver>;

export function guestWithDriver({ distance = 0x2000_0000n, ...options }: Options = {}) {
  const guest = EmbeddedGuest.boot(options);
  const { kernelBase } = guest.loaded;
  const base = kernelBase + distance;
  const memory = new GuestPages(guest);
  const size = Math.ceil(PeImage.fromFile(guest.artefacts.image).sizeOfImage / PAGE_SIZE) * PAGE_SIZE;
  for (let rva = 0n; rva < BigInt(size); rva += PAGE) {
    const page = memory.read(kernelBase + rva, PAGE_SIZE);
    if (page !== undefined) memory.map(base + rva, page);
  }
  // Behind the driver: the list's head and the driver's entry.
  const head = pageBase(base + BigInt(size) + 2n * PAGE);
  const entry = head + 0x100n;
  const list = Buffer.alloc(PAGE_SIZE);
  const name = Buffer.from(DRIVER, 'utf16le');
  const put = (at: Gva, value: bigint) => list.writeBigUInt64LE(value, Number(at - head));
  for (const [from, to] of [
    [head, entry],
    [entry, head],
  ] as const) {
    put(from, to);
    put(from + 8n, to);
  }
  put(entry + 0x30n, base);
  put(entry + 0x40n, BigInt(size));
  put(entry + 0x58n, BigInt(name.length));
  put(entry + 0x60n, head + 0x800n);
  name.copy(list, 0x800);
  memory.map(head, list);

  const booted = guest.image();
  redirectCalls(guest, memory, base);

  return {
    guest,
    base,
    memory,
    /** The driver's pages that are there. */
    image(): Map<Gva, string> {
      const pages = new Map<Gva, string>();
      for (let rva = 0n; rva < BigInt(size); rva += PAGE) {
        const page = memory.read(base + rva, PAGE_SIZE);
        if (page !== undefined) pages.set(base + rva, hashOf(page));
      }
      return pages;
    },
    /** Whether all of NT's image is as it was; once the workload has left the driver. */
    isNtAsBooted: () => guest.image() === booted,
    attach: (attachOptions: Parameters<EmbeddedGuest['attach']>[0] = {}) =>
      guest.attach({ kernel: knowList(guest.discover(), head), ...attachOptions }),
    /** Takes the driver out of the list. */
    unlist() {
      const before = memory.read(head, 16)!;
      const links = Buffer.alloc(16);
      links.writeBigUInt64LE(head, 0);
      links.writeBigUInt64LE(head, 8);
      memory.write(head, links);
      return { restore: () => memory.write(head, before) };
    },
    /** Unmaps the driver; returns the frames that its pages had. */
    unmapDriver(): Map<Gva, Gpa> {
      const frames = new Map<Gva, Gpa>();
      for (let rva = 0n; rva < BigInt(size); rva += PAGE) {
        const frame = memory.remap(base + rva, undefined);
        if (frame !== undefined) frames.set(base + rva, frame);
      }
      return frames;
    },
    /** The workload runs in NT again. */
    leaveDriver: () => redirectCalls(guest, memory, kernelBase, base),
  };
}

export function hashOf(page: Buffer): string {
  return createHash('sha256').update(page).digest('hex');
}

/** Tells the kernel where the list is, and the profile what its entries look like. */
function knowList(kernel: Kernel, head: Gva): Kernel {
  const { profile } = kernel;
  const symbol = kernel.symbol.bind(kernel);
  kernel.symbol = (name) => (name === LIST ? head : symbol(name));
  const hasSymbol = profile.hasSymbol.bind(profile);
  profile.hasSymbol = (name) => name === LIST || hasSymbol(name);
  const hasField = profile.hasField.bind(profile);
  profile.hasField = (type, field) => type === TYPE || hasField(type, field);
  const offset = profile.offset.bind(profile);
  profile.offset = (type, field) => (type === TYPE ? FIELDS[field]! : offset(type, field));
  return kernel;
}

/** Has the workload call its functions in the image at `to`. */
function redirectCalls(
  guest: EmbeddedGuest,
  memory: GuestPages,
  to: Gva,
  from = guest.loaded.kernelBase,
): void {
  const { sites } = guest.artefacts;
  const functions = new Set(sites.sites.map(({ functionRva }) => BigInt(functionRva)));
  const { rva, virtualSize } = guest.peSection('.rdata');
  const start = guest.loaded.kernelBase + BigInt(rva);
  const table = memory.read(start, virtualSize)!;
  for (let at = 0; at + 16 <= table.length; at += 8) {
    const target = table.readBigUInt64LE(at);
    if (!functions.has(target - from)) continue;
    const call = Buffer.alloc(8);
    call.writeBigUInt64LE(target - from + to);
    memory.write(start + BigInt(at), call);
  }
}

/** The pages of the kernel's half, as its page tables have them. */
class GuestPages {
  readonly #free: Gpa[];

  constructor(private readonly guest: EmbeddedGuest) {
    const used = new Set<Gpa>();
    const userRoot = this.#entry(
      guest.loaded.translate(guest.loaded.bootBlock)! + BigInt(BOOT_BLOCK.userCr3),
    );
    for (const root of [guest.loaded.directoryTable, userRoot]) this.#collect(root & FRAME, 3, used);
    const frames = Array.from({ length: guest.machine.memoryBytes / PAGE_SIZE - 1 }, (_, i) => i + 1);
    this.#free = frames.map((frame) => gpaOfFrame(BigInt(frame))).filter((gpa) => !used.has(gpa));
  }

  read(gva: Gva, length: number): Buffer | undefined {
    const pieces: Buffer[] = [];
    for (let at = gva; at < gva + BigInt(length); at = pageBase(at) + PAGE) {
      const gpa = this.translate(at);
      if (gpa === undefined) return undefined;
      const end = pageBase(at) + PAGE;
      const last = gva + BigInt(length);
      pieces.push(this.guest.machine.readPhysical(gpa, Number((end < last ? end : last) - at)));
    }
    return Buffer.concat(pieces);
  }

  /** On one page. */
  write(gva: Gva, bytes: Buffer): void {
    this.guest.machine.writePhysical(this.translate(gva)!, bytes);
  }

  /** Maps a page with these bytes. */
  map(gva: Gva, bytes: Buffer): void {
    const gpa = this.takeFrame();
    this.guest.machine.writePhysical(gpa, bytes);
    this.remap(gva, gpa);
  }

  /** Maps `gva` to the frame at `gpa`, or to none; returns the frame that it was mapped to. */
  remap(gva: Gva, gpa: Gpa | undefined): Gpa | undefined {
    const slot = this.#slot(gva, true)!;
    const before = this.#entry(slot);
    this.#setEntry(slot, gpa === undefined ? 0n : gpa | PRESENT | WRITABLE);
    // In place of an INVLPG.
    const { machine } = this.guest;
    for (let vcpu = 0; vcpu < machine.vcpuCount; vcpu++) {
      machine.setRegisters(vcpu, { cr3: machine.registers(vcpu).cr3 });
    }
    return (before & PRESENT) === 0n ? undefined : before & FRAME;
  }

  translate(gva: Gva): Gpa | undefined {
    const slot = this.#slot(gva, false);
    const entry = slot === undefined ? 0n : this.#entry(slot);
    return (entry & PRESENT) === 0n ? undefined : (entry & FRAME) + (gva & (PAGE - 1n));
  }

  takeFrame(): Gpa {
    const gpa = this.#free.pop()!;
    this.guest.machine.writePhysical(gpa, Buffer.alloc(PAGE_SIZE));
    return gpa;
  }

  /** Where the entry of a page lies in its page table. */
  #slot(gva: Gva, make: boolean): Gpa | undefined {
    let table = this.guest.loaded.directoryTable & FRAME;
    for (const shift of [39n, 30n, 21n]) {
      const slot = table + ((gva >> shift) & 0x1ffn) * 8n;
      if ((this.#entry(slot) & PRESENT) === 0n) {
        if (!make) return undefined;
        this.#setEntry(slot, this.takeFrame() | PRESENT | WRITABLE);
      }
      table = this.#entry(slot) & FRAME;
    }
    return table + ((gva >> 12n) & 0x1ffn) * 8n;
  }

  #collect(table: Gpa, level: number, used: Set<Gpa>): void {
    used.add(table);
    const entries = this.guest.machine.readPhysical(table, PAGE_SIZE);
    for (let index = 0; index < ENTRIES; index++) {
      const entry = entries.readBigUInt64LE(index * 8);
      if ((entry & PRESENT) === 0n) continue;
      if (level > 0) this.#collect(entry & FRAME, level - 1, used);
      else used.add(entry & FRAME);
    }
  }

  #entry(slot: Gpa): bigint {
    return this.guest.machine.readPhysical(slot, 8).readBigUInt64LE();
  }

  #setEntry(slot: Gpa, value: bigint): void {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64LE(value);
    this.guest.machine.writePhysical(slot, bytes);
  }
}

// A guest in a sparse physical memory: page tables, a kernel image, processors, processes and threads, at the
// offsets of Windows 10 x64 build 19041. It never runs; tests put it into the state that they are about.
import { type Profile, parseProfile } from '../../src/nt/profile.js';
import {
  type Gpa,
  type Gva,
  gfnOf,
  gpaOfFrame,
  hex,
  PAGE_SIZE,
  pageBase,
  pageOffset,
} from '../../src/vmi/address.js';
import type { Hypervisor } from '../../src/vmi/hypervisor.js';
import { GPR_NAMES, type Registers } from '../../src/x86/registers.js';

const PAGE = BigInt(PAGE_SIZE);
const PRESENT_WRITABLE = 3n;
const ENTRY_ADDRESS = 0x000f_ffff_ffff_f000n;
const PRCB = 0x180n;

const OFFSETS: Record<string, Record<string, number>> = {
  _EPROCESS: {
    UniqueProcessId: 0x440,
    ActiveProcessLinks: 0x448,
    ImageFileName: 0x5a8,
    ThreadListHead: 0x5e0,
  },
  _KPROCESS: { DirectoryTableBase: 0x28, ThreadListHead: 0x30 },
  _ETHREAD: { Cid: 0x478, ThreadListEntry: 0x4e8 },
  _KTHREAD: {
    InitialStack: 0x28,
    StackLimit: 0x30,
    StackBase: 0x38,
    KernelStack: 0x58,
    TrapFrame: 0x90,
    State: 0x184,
    WaitMode: 0x187,
    Process: 0x220,
    WaitReason: 0x283,
    ThreadListEntry: 0x2f8,
  },
  _KSTACK_CONTROL: { StackBase: 0, ActualLimit: 8, Previous: 0x10 },
  _KERNEL_STACK_SEGMENT: { StackBase: 0, StackLimit: 8, KernelStack: 0x10, InitialStack: 0x18 },
  _KLDR_DATA_TABLE_ENTRY: { InLoadOrderLinks: 0, DllBase: 0x30, SizeOfImage: 0x40, BaseDllName: 0x58 },
  _KPCR: { GdtBase: 0, TssBase: 8, Self: 0x18, CurrentPrcb: 0x20, IdtBase: 0x38, Prcb: 0x180 },
  _KPRCB: {
    CurrentThread: 8,
    NextThread: 0x10,
    IdleThread: 0x18,
    RspBase: 0x28,
    DpcStack: 0x32a0,
    IsrStack: 0x80c0,
  },
  _KTRAP_FRAME: {
    MxCsr: 0x2c,
    Rax: 0x30,
    Rcx: 0x38,
    Rdx: 0x40,
    R8: 0x48,
    R9: 0x50,
    R10: 0x58,
    R11: 0x60,
    Rbp: 0x158,
    Rip: 0x168,
    SegCs: 0x170,
    EFlags: 0x178,
    Rsp: 0x180,
    SegSs: 0x188,
  },
};

const SMALL_FIELDS: ReadonlySet<string> = new Set(['State', 'WaitMode', 'WaitReason']);

const SYMBOLS: Record<string, number> = {
  KiSystemCall64: 0x1080,
  NtClose: 0x1100,
  KiServiceTable: 0x1800,
  PsInitialSystemProcess: 0x5000,
  PsActiveProcessHead: 0x5020,
  KiServiceLimit: 0x5030,
  PsLoadedModuleList: 0x5040,
  KiProcessorBlock: 0x5100,
};

const SERVICES = 0x1d0;
const SECTIONS: readonly [name: string, rva: number, size: number, flags: number][] = [
  ['.text', 0x1000, 0x2000, 0x68000020],
  ['PAGE', 0x3000, 0x1000, 0x60000020],
  ['.rdata', 0x4000, 0x1000, 0x48000040],
  ['.data', 0x5000, 0x1000, 0xc8000040],
  ['INIT', 0x6000, 0x1000, 0x62000020],
];
export const IMAGE_SIZE = 0x7000;
const GUID = '0123456789ABCDEF0123456789ABCDEF';
const GUID_BYTES = Buffer.from('67452301ab89efcd0123456789abcdef', 'hex');

export const State = { Ready: 1, Running: 2, Standby: 3, Terminated: 4, Waiting: 5 } as const;

function isfOfFakeGuest() {
  return {
    metadata: { windows: { pdb: { GUID, age: 1, database: 'ntkrnlmp.pdb' } } },
    base_types: {},
    enums: {},
    symbols: Object.fromEntries(Object.entries(SYMBOLS).map(([name, address]) => [name, { address }])),
    user_types: Object.fromEntries(
      Object.entries(OFFSETS).map(([type, fields]) => [
        type,
        { fields: Object.fromEntries(Object.entries(fields).map(([field, offset]) => [field, { offset }])) },
      ]),
    ),
  };
}

/** The profile of the fake guest's kernel as ISF text; `change` may alter it first. */
export function profileText(change: (isf: ReturnType<typeof isfOfFakeGuest>) => void = () => {}): string {
  const isf = isfOfFakeGuest();
  change(isf);
  return JSON.stringify(isf);
}

export const profile: Profile = parseProfile(profileText(), 'the fake guest');

export interface FakeThread {
  readonly gva: Gva;
  /** Exclusive upper and inclusive lower end of its stack. */
  readonly base: Gva;
  readonly limit: Gva;
}

export interface FakeProcessor {
  readonly kpcr: Gva;
  readonly tss: Gva;
  readonly idle: FakeThread;
  readonly dpcStack: Gva;
  readonly isrStack: Gva;
}

export interface FakeGuestOptions {
  readonly vcpus?: number;
  readonly base?: Gva;
}

export class FakeGuest implements Hypervisor {
  readonly maxPhysicalAddress = 1n << 40n;
  readonly base: Gva;
  readonly kernelRoot: Gpa;
  /** As under KVA shadow: maps the page of the system call entry only. */
  readonly userRoot: Gpa;
  readonly vcpus: Registers[];
  readonly processors: FakeProcessor[];
  readonly system: Gva;
  private readonly frames = new Map<bigint, Buffer>();
  private nextFrame = 0x100n;
  private nextAllocation: Gva = 0xffff_ae00_0000_0000n;
  private nextThreadId = 4n;

  constructor({ vcpus = 1, base = 0xffff_f804_1a21_3000n }: FakeGuestOptions = {}) {
    this.base = base;
    this.kernelRoot = this.newFrame();
    this.userRoot = this.newFrame();
    this.mapImage();
    this.emptyList(this.symbol('PsActiveProcessHead'));
    this.emptyList(this.symbol('PsLoadedModuleList'));
    this.system = this.addProcess('System', 4n);
    this.write64(this.symbol('PsInitialSystemProcess'), this.system);
    const idleProcess = this.newProcess('Idle', 0n);
    this.processors = Array.from({ length: vcpus }, (_, index) => this.newProcessor(index, idleProcess));
    this.vcpus = this.processors.map((processor) => this.idleRegisters(processor));
  }

  get vcpuCount(): number {
    return this.vcpus.length;
  }

  symbol(name: string): Gva {
    return this.base + BigInt(SYMBOLS[name]!);
  }

  // Building

  /** Fresh mapped memory with an unmapped page on both sides. */
  allocate(bytes: number): Gva {
    const start = this.nextAllocation;
    const pages = Math.ceil(bytes / PAGE_SIZE);
    for (let page = 0; page < pages; page++)
      this.map(this.kernelRoot, start + BigInt(page) * PAGE, this.newFrame());
    this.nextAllocation = start + BigInt(pages + 1) * PAGE;
    return start;
  }

  map(root: Gpa, gva: Gva, frame: Gpa): void {
    let table = root;
    for (const shift of [39n, 30n, 21n]) {
      const slot = table + ((gva >> shift) & 0x1ffn) * 8n;
      let entry = this.readPhysical64(slot);
      if (entry === 0n) {
        entry = this.newFrame() | PRESENT_WRITABLE;
        this.writePhysical64(slot, entry);
      }
      table = entry & ENTRY_ADDRESS;
    }
    this.writePhysical64(table + ((gva >> 12n) & 0x1ffn) * 8n, frame | PRESENT_WRITABLE);
  }

  /** Maps a fresh page at `gva`, in user space or elsewhere. */
  mapFresh(gva: Gva): void {
    this.map(this.kernelRoot, gva, this.newFrame());
  }

  /** Takes the page away, as a page-out does. */
  unmap(gva: Gva): void {
    let table = this.kernelRoot;
    for (const shift of [39n, 30n, 21n]) {
      table = this.readPhysical64(table + ((gva >> shift) & 0x1ffn) * 8n) & ENTRY_ADDRESS;
    }
    this.writePhysical64(table + ((gva >> 12n) & 0x1ffn) * 8n, 0n);
  }

  write(gva: Gva, bytes: Uint8Array): void {
    for (let done = 0; done < bytes.length; ) {
      const at = gva + BigInt(done);
      const piece = Math.min(PAGE_SIZE - pageOffset(at), bytes.length - done);
      const gpa = this.translate(this.kernelRoot, at);
      if (gpa === undefined) throw new Error(`the test writes to unmapped ${hex(at)}`);
      this.writePhysical(gpa, bytes.subarray(done, done + piece));
      done += piece;
    }
  }

  write64(gva: Gva, value: bigint): void {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64LE(BigInt.asUintN(64, value));
    this.write(gva, bytes);
  }

  read64(gva: Gva): bigint {
    return Buffer.from(this.readPhysical(this.translate(this.kernelRoot, gva)!, 8)).readBigUInt64LE();
  }

  /** Writes a field of a structure; 1 byte for the small ones, 8 for the others. */
  set(gva: Gva, type: string, field: string, value: bigint): void {
    const at = gva + this.offset(type, field);
    if (SMALL_FIELDS.has(field)) this.write(at, Buffer.from([Number(value)]));
    else this.write64(at, value);
  }

  offset(type: string, field: string): bigint {
    return BigInt(OFFSETS[type]![field]!);
  }

  addProcess(name: string, pid: bigint): Gva {
    const gva = this.newProcess(name, pid);
    this.append(this.symbol('PsActiveProcessHead'), gva + this.offset('_EPROCESS', 'ActiveProcessLinks'));
    return gva;
  }

  /** A waiting thread whose saved stack pointer is `depth` bytes below its stack base. */
  addThread(
    process: Gva,
    {
      state = State.Waiting,
      waitReason = 6,
      depth = 0x400n,
      stackBytes = 0x6000,
    }: Partial<ThreadOptions> = {},
  ): FakeThread {
    const thread = this.newThread(process, { state, waitReason, depth, stackBytes });
    const listEntry = thread.gva + this.offset('_ETHREAD', 'ThreadListEntry');
    this.append(process + this.offset('_EPROCESS', 'ThreadListHead'), listEntry);
    return thread;
  }

  /** Makes `thread` the current one of `vcpu`, in kernel mode with `depth` bytes on its stack. */
  run(vcpu: number, thread: FakeThread, depth = 0x200n): void {
    this.set(thread.gva, '_KTHREAD', 'State', BigInt(State.Running));
    const prcb = this.processors[vcpu]!.kpcr + PRCB;
    this.set(prcb, '_KPRCB', 'CurrentThread', thread.gva);
    this.set(prcb, '_KPRCB', 'RspBase', this.initialStack(thread));
    this.write64(this.processors[vcpu]!.tss + 4n, this.initialStack(thread));
    this.vcpus[vcpu]!.rsp = thread.base - depth;
  }

  /** Puts `vcpu` into user mode, GS swapped. */
  enterUserMode(vcpu: number): void {
    const registers = this.vcpus[vcpu]!;
    Object.assign(registers, {
      cs: 0x33n,
      ss: 0x2bn,
      rip: 0x7ff6_0000_1000n,
      rsp: 0x12_f000n,
      gsBase: 0x9_0000n,
      shadowGs: this.processors[vcpu]!.kpcr,
    });
  }

  /** Puts an image into the list of loaded modules; returns its entry. */
  addModule(name: string, base: Gva, size: number): Gva {
    const entry = this.allocate(0x1000);
    const at = (field: string) => entry + this.offset('_KLDR_DATA_TABLE_ENTRY', field);
    const text = Buffer.from(name, 'utf16le');
    this.write(entry + 0x800n, text);
    this.write64(at('DllBase'), base);
    this.write64(at('SizeOfImage'), BigInt(size));
    this.write64(at('BaseDllName'), BigInt(text.length | (text.length << 16)));
    this.write64(at('BaseDllName') + 8n, entry + 0x800n);
    this.append(this.symbol('PsLoadedModuleList'), at('InLoadOrderLinks'));
    return entry;
  }

  /** Maps an image as the loader does, and puts it into the list of loaded modules; returns its entry. */
  loadModule(name: string, base: Gva, image: Uint8Array): Gva {
    for (let rva = 0; rva < image.length; rva += PAGE_SIZE) this.mapFresh(base + BigInt(rva));
    this.write(base, image);
    return this.addModule(name, base, image.length);
  }

  /** Takes a module out of the list again. */
  removeModule(entry: Gva): void {
    const [next, previous] = [this.read64(entry), this.read64(entry + 8n)];
    this.write64(previous, next);
    this.write64(next + 8n, previous);
  }

  setIst(vcpu: number, number: number, top: Gva): void {
    this.write64(this.processors[vcpu]!.tss + BigInt(0x24 + (number - 1) * 8), top);
  }

  /** Gives a thread a further stack, as KeExpandKernelStackAndCallout does, leaving `depth` bytes on the last. */
  expandStack(thread: FakeThread, depth: bigint): FakeThread {
    const limit = this.allocate(0x6000);
    const expanded = { gva: thread.gva, limit, base: limit + 0x6000n };
    const previous = this.initialStack(expanded) + this.offset('_KSTACK_CONTROL', 'Previous');
    this.set(previous, '_KERNEL_STACK_SEGMENT', 'StackBase', thread.base);
    this.set(previous, '_KERNEL_STACK_SEGMENT', 'StackLimit', thread.limit);
    this.set(previous, '_KERNEL_STACK_SEGMENT', 'KernelStack', thread.base - depth);
    this.set(previous, '_KERNEL_STACK_SEGMENT', 'InitialStack', this.initialStack(thread));
    this.set(thread.gva, '_KTHREAD', 'StackBase', expanded.base);
    this.set(thread.gva, '_KTHREAD', 'StackLimit', expanded.limit);
    this.set(thread.gva, '_KTHREAD', 'InitialStack', this.initialStack(expanded));
    this.set(thread.gva, '_KTHREAD', 'KernelStack', expanded.base - 0x400n);
    return expanded;
  }

  initialStack(thread: FakeThread): Gva {
    return thread.base - 0x50n;
  }

  // Hypervisor

  readPhysical(gpa: Gpa, length: number): Buffer {
    const result = Buffer.alloc(length);
    for (let done = 0; done < length; ) {
      const at = gpa + BigInt(done);
      const piece = Math.min(PAGE_SIZE - pageOffset(at), length - done);
      const frame = this.frames.get(gfnOf(at));
      frame?.copy(result, done, pageOffset(at), pageOffset(at) + piece);
      done += piece;
    }
    return result;
  }

  writePhysical(gpa: Gpa, bytes: Uint8Array): void {
    this.frames.get(gfnOf(gpa))!.set(bytes, pageOffset(gpa));
  }

  translate(pageTable: Gpa, gva: Gva): Gpa | undefined {
    let table = pageTable;
    for (const shift of [39n, 30n, 21n, 12n]) {
      const entry = this.readPhysical64(table + ((gva >> shift) & 0x1ffn) * 8n);
      if ((entry & 1n) === 0n) return undefined;
      table = entry & ENTRY_ADDRESS;
    }
    return table | BigInt(pageOffset(gva));
  }

  registers(vcpu: number): Registers {
    return { ...this.vcpus[vcpu]! };
  }

  flushCaches(): void {}
  setRegisters(): void {}
  pause(): void {}
  resume(): void {}
  trapAccess(): void {}
  releaseAccess(): void {}
  onViolation(): void {}
  listen(): number {
    return 0;
  }
  close(): void {}

  private newFrame(): Gpa {
    const frame = this.nextFrame++;
    this.frames.set(frame, Buffer.alloc(PAGE_SIZE));
    return gpaOfFrame(frame);
  }

  private readPhysical64(gpa: Gpa): bigint {
    return this.readPhysical(gpa, 8).readBigUInt64LE();
  }

  private writePhysical64(gpa: Gpa, value: bigint): void {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64LE(value);
    this.writePhysical(gpa, bytes);
  }

  private mapImage(): void {
    for (let rva = 0; rva < IMAGE_SIZE; rva += PAGE_SIZE) {
      this.map(this.kernelRoot, this.base + BigInt(rva), this.newFrame());
    }
    this.write(this.base, kernelImage());
    const entry = pageBase(this.symbol('KiSystemCall64'));
    this.map(this.userRoot, entry, this.translate(this.kernelRoot, entry)!);
  }

  private newProcess(name: string, pid: bigint): Gva {
    const gva = this.allocate(0x1000);
    // A PCID in the low bits and the no-flush bit, as NT stores it.
    this.set(gva, '_KPROCESS', 'DirectoryTableBase', this.kernelRoot | 2n | (1n << 63n));
    this.set(gva, '_EPROCESS', 'UniqueProcessId', pid);
    this.write(gva + this.offset('_EPROCESS', 'ImageFileName'), Buffer.from(name, 'latin1'));
    this.emptyList(gva + this.offset('_EPROCESS', 'ThreadListHead'));
    return gva;
  }

  private newThread(process: Gva, { state, waitReason, depth, stackBytes }: ThreadOptions): FakeThread {
    const gva = this.allocate(0x1000);
    const limit = this.allocate(stackBytes);
    const thread = { gva, limit, base: limit + BigInt(stackBytes) };
    this.set(gva, '_KTHREAD', 'Process', process);
    this.set(gva, '_KTHREAD', 'StackLimit', thread.limit);
    this.set(gva, '_KTHREAD', 'StackBase', thread.base);
    this.set(gva, '_KTHREAD', 'InitialStack', this.initialStack(thread));
    this.set(gva, '_KTHREAD', 'KernelStack', thread.base - depth);
    this.set(gva, '_KTHREAD', 'State', BigInt(state));
    this.set(gva, '_KTHREAD', 'WaitReason', BigInt(waitReason));
    this.write64(gva + this.offset('_ETHREAD', 'Cid') + 8n, this.nextThreadId);
    this.nextThreadId += 4n;
    return thread;
  }

  private newProcessor(index: number, idleProcess: Gva): FakeProcessor {
    const kpcr = this.allocate(0x9000);
    const tss = this.allocate(0x1000);
    const idle = this.newThread(idleProcess, {
      state: State.Running,
      waitReason: 0,
      depth: 0x200n,
      stackBytes: 0x6000,
    });
    const dpcStack = this.allocate(0x6000) + 0x6000n;
    const isrStack = this.allocate(0x6000) + 0x6000n;
    this.set(kpcr, '_KPCR', 'TssBase', tss);
    this.set(kpcr, '_KPCR', 'Self', kpcr);
    this.set(kpcr, '_KPCR', 'CurrentPrcb', kpcr + PRCB);
    const prcb = kpcr + PRCB;
    this.set(prcb, '_KPRCB', 'CurrentThread', idle.gva);
    this.set(prcb, '_KPRCB', 'IdleThread', idle.gva);
    this.set(prcb, '_KPRCB', 'RspBase', this.initialStack(idle));
    this.set(prcb, '_KPRCB', 'DpcStack', dpcStack);
    this.set(prcb, '_KPRCB', 'IsrStack', isrStack);
    this.write64(this.symbol('KiProcessorBlock') + BigInt(index * 8), prcb);
    this.write64(tss + 4n, this.initialStack(idle));
    return { kpcr, tss, idle, dpcStack, isrStack };
  }

  private idleRegisters({ kpcr, tss, idle }: FakeProcessor): Registers {
    const gprs = Object.fromEntries(GPR_NAMES.map((name) => [name, 0n])) as Record<
      (typeof GPR_NAMES)[number],
      bigint
    >;
    return {
      ...gprs,
      rsp: idle.base - 0x200n,
      rip: this.symbol('NtClose'),
      rflags: 0x246n,
      cr0: 0x8005_0033n,
      cr2: 0n,
      cr3: this.kernelRoot | 2n,
      cr4: 0x3506f8n & ~(1n << 12n),
      efer: 0xd01n,
      lstar: this.symbol('KiSystemCall64'),
      fsBase: 0n,
      gsBase: kpcr,
      shadowGs: 0n,
      cs: 0x10n,
      ss: 0x18n,
      trBase: tss,
      idtrBase: 0n,
      gdtrBase: 0n,
    };
  }

  private emptyList(head: Gva): void {
    this.write64(head, head);
    this.write64(head + 8n, head);
  }

  private append(head: Gva, entry: Gva): void {
    const last = this.read64(head + 8n);
    this.write64(entry, head);
    this.write64(entry + 8n, last);
    this.write64(last, entry);
    this.write64(head + 8n, entry);
  }
}

interface ThreadOptions {
  readonly state: number;
  readonly waitReason: number;
  readonly depth: bigint;
  readonly stackBytes: number;
}

function kernelImage(): Buffer {
  const image = Buffer.alloc(IMAGE_SIZE);
  image.write('MZ');
  image.writeUInt32LE(0x80, 0x3c);
  image.write('PE\0\0', 0x80, 'latin1');
  image.writeUInt16LE(0x8664, 0x84);
  image.writeUInt16LE(SECTIONS.length, 0x86);
  const optionalSize = 112 + 16 * 8;
  image.writeUInt16LE(optionalSize, 0x94);
  const optional = 0x98;
  image.writeUInt16LE(0x20b, optional);
  image.writeBigUInt64LE(0x1_4000_0000n, optional + 24);
  image.writeUInt32LE(IMAGE_SIZE, optional + 56);
  image.writeUInt32LE(0x400, optional + 60);
  image.writeUInt32LE(16, optional + 108);
  const directory = (index: number, rva: number, size: number) => {
    image.writeUInt32LE(rva, optional + 112 + index * 8);
    image.writeUInt32LE(size, optional + 116 + index * 8);
  };
  SECTIONS.forEach(([name, rva, size, flags], index) => {
    const at = optional + optionalSize + index * 40;
    image.write(name, at, 'latin1');
    image.writeUInt32LE(size, at + 8);
    image.writeUInt32LE(rva, at + 12);
    image.writeUInt32LE(size, at + 16);
    image.writeUInt32LE(flags, at + 36);
  });

  directory(6, 0x4000, 28);
  image.writeUInt32LE(2, 0x400c);
  image.writeUInt32LE(0x80, 0x4010);
  image.writeUInt32LE(0x4100, 0x4014);
  image.write('RSDS', 0x4100);
  GUID_BYTES.copy(image, 0x4104);
  image.writeUInt32LE(1, 0x4114);
  image.write('ntkrnlmp.pdb\0', 0x4118, 'latin1');

  directory(0, 0x4200, 0x100);
  image.writeUInt32LE(1, 0x4214);
  image.writeUInt32LE(1, 0x4218);
  image.writeUInt32LE(0x4240, 0x421c);
  image.writeUInt32LE(0x4250, 0x4220);
  image.writeUInt32LE(0x4260, 0x4224);
  image.writeUInt32LE(SYMBOLS.NtClose!, 0x4240);
  image.writeUInt32LE(0x4270, 0x4250);
  image.write('NtClose\0', 0x4270, 'latin1');

  image.writeUInt32LE(SERVICES, SYMBOLS.KiServiceLimit!);
  return image;
}

import { type CloakMap, MAX_ANSWER } from '../cloak/cloak-map.js';
import { type ErrorCode, MemtablesError } from '../errors.js';
import type { KernelImages } from '../nt/kernel-images.js';
import { checkCandidate, isByteCandidate } from '../switches/candidate.js';
import { type Gfn, type Gpa, type Gva, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import type { HiddenMemory, HiddenPiece, Hypervisor, Violation, ViolationAnswer } from '../vmi/hypervisor.js';
import { gprName, type Instruction, MAX_INSTRUCTION_LENGTH, Register } from '../x86/instruction.js';
import type { CachedInstruction, InstructionCache } from '../x86/instruction-cache.js';
import { onlyReadOf } from '../x86/only-read.js';
import type { CodeChange } from './patcher.js';
import { PATIENT_TRIES, type Site, type SiteTable } from './sites.js';

const UNREADABLE_CODE: ReadonlySet<ErrorCode> = new Set(['GUEST_STRUCTURE_INVALID', 'GUEST_MEMORY_UNMAPPED']);

/** A guest can make up readers without end; beyond this many they are only counted. */
const MAX_READERS = 65_536;
/** A guest that keeps writing over hidden bytes must not fill our memory between two work steps. */
const MAX_PENDING_WRITES = 4096;
/** What an address that is in no image is in. */
const NOWHERE = { start: 0n, end: 0n };
/** A thread that was preempted has a good chance to be gone by then. Each try stops the guest: late ones are rarer. */
const RETRY_MS = 20;
const TRIES_PER_DOUBLING = 10;
const LONGEST_RETRY_MS = 1000;
/** libvmi keeps a page for two seconds. */
const LONGEST_CACHED_MS = 2500;

/** A guest write to hidden bytes, to be dealt with in the next work step. */
export interface GuestWrite {
  readonly gpa: Gpa;
  /** Bytes on this page, if known. */
  readonly length: number | undefined;
}

/**
 * Answers EPT violations. It only looks up, counts and answers: what it finds worth doing it queues for the
 * work step, in which the guest is quiescent.
 */
export class Monitor implements HiddenMemory {
  violations = 0;
  tableLoads = 0;
  staleEvents = 0;
  cloakedWrites = 0;
  otherReads = 0;
  readonly cloakedReads = new Map<string, number>();
  readonly readers = new Map<Gva, number>();
  #relocating = false;
  #queue: Site[] = [];
  /** Sites to try again, those that are due first. */
  #postponed: { readonly site: Site; readonly due: number }[] = [];
  readonly #writes = new Map<string, GuestWrite>();
  /** When the guest last wrote to a trapped frame. */
  #wroteAt = Number.NEGATIVE_INFINITY;

  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly images: KernelImages,
    private readonly cloaks: CloakMap<CodeChange>,
    private readonly instructions: InstructionCache,
    private readonly sites: SiteTable,
    private readonly threshold: number,
  ) {}

  /** Whether sites that have crossed the threshold are queued; those that did so before are queued now. */
  set relocating(enabled: boolean) {
    this.#relocating = enabled;
    if (!enabled) {
      const postponed = this.#postponed.splice(0).map(({ site }) => site);
      for (const site of [...this.#queue.splice(0), ...postponed]) {
        if (site.state === 'queued') site.state = 'counted';
      }
    }
    for (const site of this.sites.all()) this.#queueIfDue(site);
  }

  /** True when the next work step has something to do. */
  get hasWork(): boolean {
    this.#queuePostponed();
    return this.#queue.length > 0 || this.hasWrites;
  }

  /** True when the guest has written to hidden bytes. */
  get hasWrites(): boolean {
    return this.#writes.size > 0;
  }

  handle(violation: Violation): ViolationAnswer {
    this.violations++;
    const instruction = this.#instructionAt(violation.rip);
    if (violation.write) this.#noteWrite(violation, instruction);
    if (!violation.read) return undefined;
    this.#count(violation, instruction);
    // Never only as much as was decoded: the code at RIP may be another by now than the one that is cached.
    return this.cloaks.answer(violation.gpa, this.#readPhysical);
  }

  onlyRead({ rip, gva }: Violation): number | undefined {
    // What is cached may not be the code any more, and a wrong answer would be a wrong value in the guest.
    const code = this.#readable(() => this.#codeAt(rip));
    const bytes = code && onlyReadOf(code);
    if (bytes === undefined || bytes > MAX_ANSWER) return undefined;
    const offset = pageOffset(gva);
    // At the start of a page it may be the end of a read that begins on the page before.
    return offset + bytes <= PAGE_SIZE && (offset > 0 || bytes === 1) ? bytes : undefined;
  }

  piecesOn(gfn: Gfn): readonly HiddenPiece[] {
    return this.cloaks.on(gfn);
  }

  written(pieces: readonly HiddenPiece[]): void {
    this.#wroteAt = performance.now();
    // Which virtual addresses the frame has is not known.
    this.instructions.clear();
    if (pieces.length > 0) this.cloakedWrites++;
    for (const { gpa } of pieces) this.#rememberWrite({ gpa, length: undefined });
  }

  #count(violation: Violation, instruction: CachedInstruction | undefined): void {
    const relocated = this.sites.relocatedAt(violation.rip);
    if (relocated !== undefined) {
      // Its load was decoded before it was replaced; the hypervisor completes it as it was.
      this.staleEvents++;
      relocated.stale++;
      return;
    }
    const guarded = this.sites.ofFallback(violation.rip);
    if (guarded !== undefined) {
      guarded.beyondBound++;
      return;
    }
    const access = instruction?.read;
    const reach = Math.min(access?.bytes ?? MAX_ANSWER, PAGE_SIZE - pageOffset(violation.gpa));
    if (this.cloaks.touches(violation.gpa, reach)) {
      const form = access?.form ?? 'unknown';
      this.cloakedReads.set(form, (this.cloakedReads.get(form) ?? 0) + 1);
    } else if (instruction === undefined || !this.#countTableLoad(instruction, violation)) {
      this.#countReader(violation.rip);
    }
  }

  /** The next site to relocate, each once; not those that have been dealt with together with another. */
  takeSite(): Site | undefined {
    for (;;) {
      const site = this.#queue.shift();
      if (site === undefined || site.state === 'queued') return site;
    }
  }

  /** Has a site relocated before it is hot. */
  plan(site: Site): void {
    site.isPlanned = true;
    this.#queueIfDue(site);
  }

  /** Has a site that was taken come again, when the guest has run on. */
  postpone(site: Site): void {
    const late = Math.max(0, site.tries - PATIENT_TRIES);
    const doublings = Math.ceil(late / TRIES_PER_DOUBLING);
    const delay = Math.min(RETRY_MS * 2 ** doublings, LONGEST_RETRY_MS);
    this.#postponed.push({ site, due: performance.now() + delay });
  }

  #queuePostponed(): void {
    const now = performance.now();
    const isDue = ({ due }: { readonly due: number }) => due <= now;
    if (!this.#postponed.some(isDue)) return;
    this.#queue.push(...this.#postponed.filter(isDue).map(({ site }) => site));
    this.#postponed = this.#postponed.filter((each) => !isDue(each));
  }

  /** The guest's writes to hidden bytes; `unknown` when there were too many to remember. */
  get writes(): readonly GuestWrite[] | 'unknown' {
    return this.#writes.size > MAX_PENDING_WRITES ? 'unknown' : [...this.#writes.values()];
  }

  /** All of `writes` have been dealt with. */
  forgetWrites(): void {
    this.#writes.clear();
  }

  /** The decoded instruction, or `undefined` where the guest shows none. */
  #instructionAt(rip: Gva): CachedInstruction | undefined {
    return this.#readable(() => this.instructions.lookup(rip, this.#codeAt));
  }

  /** A guest that changes its code or its mappings under our eyes is not an error of ours. */
  #readable<T>(read: () => T): T | undefined {
    try {
      return read();
    } catch (error) {
      if (error instanceof MemtablesError && UNREADABLE_CODE.has(error.code)) return undefined;
      throw error;
    }
  }

  /** Up to 15 bytes, fewer where the next page is not mapped. */
  readonly #codeAt = (rip: Gva): Uint8Array => {
    const onPage = PAGE_SIZE - pageOffset(rip);
    const length =
      onPage >= MAX_INSTRUCTION_LENGTH || this.images.nt.memory.isMapped(rip + BigInt(onPage))
        ? MAX_INSTRUCTION_LENGTH
        : onPage;
    return this.images.nt.memory.read(rip, length);
  };

  /** A page that is cached may be older than a write that was an event; the write itself comes after its answer. */
  readonly #readPhysical = (gpa: Gpa, length: number): Uint8Array => {
    if (performance.now() - this.#wroteAt < LONGEST_CACHED_MS) this.hypervisor.flushCaches();
    return this.hypervisor.readPhysical(gpa, length);
  };

  #noteWrite({ gva, gpa }: Violation, instruction: CachedInstruction | undefined): void {
    this.#wroteAt = performance.now();
    const length = instruction?.write.bytes;
    const reach = Math.min(length ?? PAGE_SIZE, PAGE_SIZE - pageOffset(gpa));
    this.instructions.invalidate(gva, reach);
    if (!this.cloaks.touches(gpa, reach)) return;
    this.cloakedWrites++;
    this.#rememberWrite({ gpa, length });
  }

  #rememberWrite(write: GuestWrite): void {
    // The one beyond the limit says that there were more.
    if (this.#writes.size <= MAX_PENDING_WRITES) this.#writes.set(`${write.gpa} ${write.length}`, write);
  }

  /** False when the reader is something else than a load of a table. */
  #countTableLoad(instruction: Instruction, violation: Violation): boolean {
    const table = this.#dwordTable(instruction, violation) ?? this.#byteTable(instruction, violation);
    const site = table === undefined ? undefined : this.sites.find(violation.rip, table);
    if (site === undefined) return false;
    if (this.images.rangeAt(violation.rip) === undefined) this.images.doubtList();
    this.tableLoads++;
    site.hits++;
    this.#queueIfDue(site);
    return true;
  }

  /** The table whose dword is read, by rules 0 to 9 of HVMI's documentation. */
  #dwordTable(instruction: Instruction, violation: Violation): Gva | undefined {
    const image = this.images.rangeAt(violation.gva) ?? NOWHERE;
    const source = instruction.operands[1];
    if (!checkCandidate(instruction, violation.gva, image, this.images.nt.ssdt).accepted) return undefined;
    if (source?.kind !== 'memory') return undefined;
    const value = source.base === Register.None ? 0n : violation.register(gprName(source.base));
    return BigInt.asUintN(64, value + source.displacement);
  }

  /**
   * The byte table of a two-level switch that is read. Without a scale either register may hold the image base, and one
   * of them has to: there are many other readers of bytes.
   */
  #byteTable(instruction: Instruction, violation: Violation): Gva | undefined {
    const image = this.images.rangeAt(violation.gva) ?? NOWHERE;
    const source = instruction.operands[1];
    if (!isByteCandidate(instruction, violation.gva, image, this.images.nt.ssdt)) return undefined;
    if (source?.kind !== 'memory') return undefined;
    const { start } = image;
    const holdsBase = [source.base, source.index].some((name) => violation.register(gprName(name)) === start);
    return holdsBase ? BigInt.asUintN(64, start + source.displacement) : undefined;
  }

  #queueIfDue(site: Site): void {
    if (!this.#relocating || site.state !== 'counted') return;
    if (site.hits <= this.threshold && !site.isPlanned) return;
    site.state = 'queued';
    this.#queue.push(site);
  }

  #countReader(rip: Gva): void {
    this.otherReads++;
    const reads = this.readers.get(rip);
    if (reads !== undefined || this.readers.size < MAX_READERS) this.readers.set(rip, (reads ?? 0) + 1);
  }
}

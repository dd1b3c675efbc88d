import type { CloakMap } from '../cloak/cloak-map.js';
import { type ErrorCode, MemtablesError } from '../errors.js';
import type { Kernel } from '../nt/kernel.js';
import { checkCandidate, TABLE_ENTRY_SIZE } from '../switches/candidate.js';
import { type Gpa, type Gva, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import type { Hypervisor, Violation, ViolationAnswer } from '../vmi/hypervisor.js';
import { gprName, type Instruction, MAX_INSTRUCTION_LENGTH, Register } from '../x86/instruction.js';
import type { InstructionCache } from '../x86/instruction-cache.js';
import { memoryAccess } from '../x86/memory-access.js';
import type { AppliedPatch } from './patcher.js';
import type { Site, SiteTable } from './sites.js';

const UNREADABLE_CODE: ReadonlySet<ErrorCode> = new Set(['GUEST_STRUCTURE_INVALID', 'GUEST_MEMORY_UNMAPPED']);

/** A guest can make up readers without end; beyond this many they are only counted. */
const MAX_READERS = 65_536;
/** A guest that keeps writing over hidden bytes must not fill our memory between two work steps. */
const MAX_PENDING_WRITES = 4096;

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
export class Monitor {
  violations = 0;
  tableLoads = 0;
  staleEvents = 0;
  cloakedWrites = 0;
  otherReads = 0;
  readonly cloakedReads = new Map<string, number>();
  readonly readers = new Map<Gva, number>();
  #relocating = false;
  #queue: Site[] = [];
  #writes: GuestWrite[] = [];
  /** A page that is cached may be out of date. */
  #guestWrote = false;

  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly kernel: Kernel,
    private readonly cloaks: CloakMap<AppliedPatch>,
    private readonly instructions: InstructionCache,
    private readonly sites: SiteTable,
    private readonly threshold: number,
  ) {}

  /** Whether sites that have crossed the threshold are queued; those that did so before are queued now. */
  set relocating(enabled: boolean) {
    this.#relocating = enabled;
    for (const site of this.sites.all()) this.#queueIfHot(site);
  }

  /** True when the next work step has something to do. */
  get hasWork(): boolean {
    return this.#queue.length > 0 || this.#writes.length > 0;
  }

  handle(violation: Violation): ViolationAnswer {
    this.violations++;
    const instruction = this.#instructionAt(violation.rip);
    if (violation.write) this.#noteWrite(violation, instruction);
    if (!violation.read) return undefined;

    if (this.sites.isRelocated(violation.rip)) {
      // Its load was decoded before it was replaced; the hypervisor completes it as it was.
      this.staleEvents++;
      return this.#answer(violation.gpa, TABLE_ENTRY_SIZE);
    }
    const access = instruction && memoryAccess(instruction, 'read');
    const answer = this.#answer(violation.gpa, access?.bytes);
    if (answer !== undefined) {
      increment(this.cloakedReads, access?.form ?? 'unknown');
      return answer;
    }
    if (instruction === undefined || !this.#countTableLoad(instruction, violation)) {
      this.#countReader(violation.rip);
    }
    return undefined;
  }

  /** The sites to relocate, each once. */
  takeQueue(): Site[] {
    const queue = this.#queue;
    this.#queue = [];
    return queue;
  }

  /** The guest's writes to hidden bytes since the last call. */
  takeWrites(): GuestWrite[] {
    const writes = this.#writes;
    this.#writes = [];
    return writes;
  }

  /** The decoded instruction, or `undefined` where the guest shows none. */
  #instructionAt(rip: Gva): Instruction | undefined {
    try {
      return this.instructions.lookup(rip, () => this.#codeAt(rip));
    } catch (error) {
      // A guest that changes its code or its mappings under our eyes is not an error of ours.
      if (error instanceof MemtablesError && UNREADABLE_CODE.has(error.code)) return undefined;
      throw error;
    }
  }

  /** Up to 15 bytes, fewer where the next page is not mapped. */
  #codeAt(rip: Gva): Uint8Array {
    const onPage = PAGE_SIZE - pageOffset(rip);
    const length =
      onPage >= MAX_INSTRUCTION_LENGTH || this.kernel.memory.isMapped(rip + BigInt(onPage))
        ? MAX_INSTRUCTION_LENGTH
        : onPage;
    return this.kernel.memory.read(rip, length);
  }

  #answer(gpa: Gpa, length: number | undefined): Uint8Array | undefined {
    const read = (at: Gpa, size: number) => {
      if (this.#guestWrote) this.hypervisor.flushCaches();
      this.#guestWrote = false;
      return this.hypervisor.readPhysical(at, size);
    };
    return this.cloaks.answer(gpa, read, length);
  }

  #noteWrite({ gva, gpa }: Violation, instruction: Instruction | undefined): void {
    this.#guestWrote = true;
    const length = instruction && memoryAccess(instruction, 'write').bytes;
    const reach = Math.min(length ?? PAGE_SIZE, PAGE_SIZE - pageOffset(gpa));
    this.instructions.invalidate(gva, reach);
    if (!this.cloaks.touches(gpa, reach)) return;
    this.cloakedWrites++;
    if (this.#writes.length < MAX_PENDING_WRITES) this.#writes.push({ gpa, length });
  }

  /** Rules 0 to 9 of the document; false when the reader is something else. */
  #countTableLoad(instruction: Instruction, violation: Violation): boolean {
    const verdict = checkCandidate(
      instruction,
      violation.gva,
      { start: this.kernel.base, end: this.kernel.end },
      this.kernel.ssdt,
    );
    const source = instruction.operands[1];
    if (!verdict.accepted || source?.kind !== 'memory') return false;
    const base = source.base === Register.None ? 0n : violation.register(gprName(source.base));
    const site = this.sites.find(violation.rip, BigInt.asUintN(64, base + source.displacement));
    if (site === undefined) return false;
    this.tableLoads++;
    site.hits++;
    this.#queueIfHot(site);
    return true;
  }

  #queueIfHot(site: Site): void {
    if (!this.#relocating || site.state !== 'counted' || site.hits <= this.threshold) return;
    site.state = 'queued';
    this.#queue.push(site);
  }

  #countReader(rip: Gva): void {
    this.otherReads++;
    if (this.readers.has(rip) || this.readers.size < MAX_READERS) increment(this.readers, rip);
  }
}

function increment<Key>(counters: Map<Key, number>, key: Key): void {
  counters.set(key, (counters.get(key) ?? 0) + 1);
}

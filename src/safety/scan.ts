import { MemtablesError } from '../errors.js';
import { isActive, type Kernel } from '../nt/kernel.js';
import { describeProcess, processes } from '../nt/processes.js';
import { findProcessor, type Processor } from '../nt/processors.js';
import {
  earlierStacks,
  readThread,
  savedStackPointer,
  type Thread,
  ThreadState,
  threads,
} from '../nt/threads.js';
import { type Gva, hex, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { inUserMode, type Registers } from '../x86/registers.js';
import { isMachineFrame } from './machine-frame.js';
import { type LiveRange, RangeSet } from './ranges.js';
import { type LiveStack, liveAbove, liveStacks, type StackKind } from './stacks.js';

export type { LiveRange } from './ranges.js';

/** A hostile guest can fill its stacks with pointers; one is enough to block. */
const MAX_FINDINGS = 1000;

/** A live pointer into a range: a vCPU's RIP, or a value on a stack. */
export interface Finding {
  readonly kind: 'vcpu-rip' | StackKind;
  readonly value: Gva;
  readonly range: LiveRange;
  /** It is a RIP, of a vCPU or in a machine frame; otherwise a value that may be anything, data too. */
  readonly isRip: boolean;
  /** Where on the stack the value lies; absent for a vCPU's RIP. */
  readonly where?: Gva;
  /** The vCPU whose RIP or stack it is; absent for a thread that does not run. */
  readonly vcpu?: number;
  /** The thread whose stack it is. */
  readonly thread?: Thread;
}

export interface ScanResult {
  /**
   * `blocked`: something lives in a range. `unsettled`: something could not be looked at, such as a vCPU in
   * the middle of a context switch; let the guest run on and scan again. `safe`: nothing lives in any range.
   */
  readonly verdict: 'safe' | 'blocked' | 'unsettled';
  /** At most 1,000; all there are only when `unsettled` is empty. */
  readonly findings: readonly Finding[];
  /** Why something could not be looked at. */
  readonly unsettled: readonly string[];
  readonly scannedThreads: number;
  readonly scannedBytes: number;
}

/**
 * Looks for live pointers into `ranges`: the RIP of every vCPU in kernel mode, and every aligned 8-byte value
 * in the live part of every kernel stack, be it of a thread that runs, waits or is ready, of an idle thread, or
 * of a processor (DPC, ISR, IST). To be called on a quiescent guest.
 *
 * What a thread saved below its stack pointer is dead and not looked at. Terminated threads are skipped unless
 * a vCPU still runs them. A stack that is paged out makes the verdict `unsettled`.
 *
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID`, `GUEST_MEMORY_UNMAPPED` when lists or structures do not add
 * up, so that there is no verdict at all; `INVALID_ARGUMENT` for an empty range
 */
export function scanGuest(hypervisor: Hypervisor, kernel: Kernel, ranges: readonly LiveRange[]): ScanResult {
  return new Scan(kernel, new RangeSet(ranges)).run(hypervisor);
}

class Scan {
  private readonly findings: Finding[] = [];
  private readonly unsettled: string[] = [];
  private readonly threads = new Map<Gva, Thread>();
  private readonly idleThreads = new Set<Gva>();
  private readonly scannedThreads = new Set<Gva>();
  private scannedBytes = 0;

  constructor(
    private readonly kernel: Kernel,
    private readonly ranges: RangeSet,
  ) {}

  run(hypervisor: Hypervisor): ScanResult {
    for (const process of processes(this.kernel)) {
      for (const thread of threads(this.kernel, process)) this.threads.set(thread.gva, thread);
    }
    const running = this.readProcessors(hypervisor);
    const onProcessor = new Set(running.map(({ processor }) => processor.currentThread));
    for (const { processor, registers } of running) this.scanProcessor(processor, registers, onProcessor);
    for (const thread of this.threads.values()) {
      if (!onProcessor.has(thread.gva)) this.scanSwitchedOut(thread);
    }
    return {
      verdict: this.findings.length > 0 ? 'blocked' : this.unsettled.length > 0 ? 'unsettled' : 'safe',
      findings: this.findings,
      unsettled: this.unsettled,
      scannedThreads: this.scannedThreads.size,
      scannedBytes: this.scannedBytes,
    };
  }

  /** Looks at every RIP, and adds the threads that are in no list: idle ones, and what runs regardless. */
  private readProcessors(hypervisor: Hypervisor): { processor: Processor; registers: Registers }[] {
    const running = [];
    for (let vcpu = 0; vcpu < hypervisor.vcpuCount; vcpu++) {
      const registers = hypervisor.registers(vcpu);
      if (!isActive(registers)) continue;
      if (!inUserMode(registers)) {
        const range = this.ranges.find(registers.rip);
        if (range !== undefined)
          this.report({ kind: 'vcpu-rip', value: registers.rip, range, isRip: true, vcpu });
      }
      const processor = findProcessor(this.kernel, vcpu, registers);
      if (processor === undefined) {
        this.unsettled.push(`vCPU ${vcpu} has no processor block yet`);
        continue;
      }
      this.idleThreads.add(processor.idleThread);
      for (const gva of [processor.idleThread, processor.currentThread]) {
        if (!this.threads.has(gva)) this.threads.set(gva, readThread(this.kernel, gva));
      }
      running.push({ processor, registers });
    }
    return running;
  }

  private scanProcessor(processor: Processor, registers: Registers, onProcessor: ReadonlySet<Gva>): void {
    const hasStack = ({ gva, state }: Thread) => state !== ThreadState.Terminated || onProcessor.has(gva);
    const threadAt = (address: Gva) => {
      for (const thread of this.threads.values()) {
        if (hasStack(thread) && address >= thread.stackLimit && address < thread.stackBase) return thread;
      }
      return undefined;
    };
    const thread = this.threads.get(processor.currentThread)!;
    const stacks = liveStacks(this.kernel, processor, registers, thread, threadAt);
    if (typeof stacks === 'string') {
      this.unsettled.push(stacks);
      return;
    }
    for (const stack of stacks) this.scanStack(stack);
    this.scanEarlierStacks(thread);
  }

  private scanSwitchedOut(thread: Thread): void {
    if (thread.state === ThreadState.Terminated) return;
    // An idle thread is never marked as anything else.
    if (thread.state === ThreadState.Running && !this.idleThreads.has(thread.gva)) {
      this.unsettled.push(`${describe(thread)} runs, but on no vCPU`);
      return;
    }
    const start = liveAbove(savedStackPointer(thread));
    this.scanStack({ kind: 'thread-stack', start, end: thread.stackBase, thread });
    this.scanEarlierStacks(thread);
  }

  private scanEarlierStacks(thread: Thread): void {
    for (const { rsp, base } of earlierStacks(this.kernel, thread)) {
      this.scanStack({ kind: 'thread-stack', start: liveAbove(rsp), end: base, thread });
    }
  }

  private scanStack({ kind, start, end, vcpu, thread }: LiveStack): void {
    for (let at = start; at < end; ) {
      const length = Math.min(PAGE_SIZE - pageOffset(at), Number(end - at));
      const bytes = this.readPage(at, length);
      if (bytes === undefined) {
        const owner = thread === undefined ? `vCPU ${vcpu}` : describe(thread);
        this.unsettled.push(`a stack of ${owner} is not in memory at ${hex(at)}`);
        return;
      }
      this.ranges.scan(bytes, (offset, value, range) => {
        const where = at + BigInt(offset);
        this.report({
          kind,
          value,
          range,
          isRip: this.isRip(where),
          where,
          ...(vcpu === undefined ? {} : { vcpu }),
          ...(thread === undefined ? {} : { thread }),
        });
      });
      this.scannedBytes += length;
      at += BigInt(length);
    }
    if (thread !== undefined) this.scannedThreads.add(thread.gva);
  }

  private readPage(gva: Gva, length: number): Buffer | undefined {
    return unlessUnmapped(() => this.kernel.memory.read(gva, length));
  }

  private isRip(where: Gva): boolean {
    return unlessUnmapped(() => isMachineFrame(this.kernel.memory, where)) ?? true;
  }

  private report(finding: Finding): void {
    if (this.findings.length < MAX_FINDINGS) this.findings.push(finding);
  }
}

function unlessUnmapped<T>(read: () => T): T | undefined {
  try {
    return read();
  } catch (error) {
    if (error instanceof MemtablesError && error.code === 'GUEST_MEMORY_UNMAPPED') return undefined;
    throw error;
  }
}

function describe(thread: Thread): string {
  return `thread ${thread.tid} of process ${describeProcess(thread.process)}`;
}

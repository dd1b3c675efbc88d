import { type ErrorCode, MemtablesError } from '../errors.js';
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
  waitsInUserMode,
} from '../nt/threads.js';
import { type Gva, hex, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { inUserMode, type Registers } from '../x86/registers.js';
import { readMachineFrame } from './machine-frame.js';
import { type LiveRange, RangeSet } from './ranges.js';
import { type LiveStack, liveAbove, liveStacks, type StackKind } from './stacks.js';

export type { LiveRange } from './ranges.js';

/** A hostile guest can fill its stacks with pointers; one is enough to block. */
const MAX_REPORTED = 1000;
/**
 * How much is looked at while the guest stands still. A busy Windows server has some ten thousand threads, of which
 * those that wait have a few KB alive each: 4 KB for each of the most threads make 256 MB. Few have an earlier stack.
 * A hostile guest could share one stack of 128 KB among all its threads, 256 times each.
 */
const MAX_THREADS = 0x1_0000;
const MAX_SCANNED_BYTES = 0x1000_0000;
const MAX_EARLIER_STACKS = 0x1_0000;

/** What a list or structure looks like in the middle of a change. */
const IN_MID_CHANGE: ReadonlySet<ErrorCode> = new Set(['GUEST_STRUCTURE_INVALID', 'GUEST_MEMORY_UNMAPPED']);

/** A live pointer into a range: a vCPU's RIP, or a value on a stack. */
export interface Finding {
  readonly kind: 'vcpu-rip' | StackKind;
  readonly value: Gva;
  readonly range: LiveRange;
  /** It is a RIP, of a vCPU or in a machine frame; otherwise a value that may be anything, data too. */
  readonly isRip: boolean;
  /** Where the value lies, and on which stack; absent for a vCPU's RIP. */
  readonly where?: Gva;
  readonly stack?: LiveStack;
  /** The vCPU whose RIP or stack it is; absent for a thread that does not run. */
  readonly vcpu?: number;
  /** The thread whose stack it is. */
  readonly thread?: Thread;
}

export interface ScanResult {
  /**
   * `blocked`: something lives in a range. `unsettled`: something could not be looked at, such as a vCPU in
   * the middle of a context switch, or a list in the middle of a change; let the guest run on and scan again.
   * `safe`: nothing lives in any range.
   */
  readonly verdict: 'safe' | 'blocked' | 'unsettled';
  /** At most 1,000; all there are only when `unsettled` is empty. */
  readonly findings: readonly Finding[];
  /** Why something could not be looked at; at most 1,000 reasons. */
  readonly unsettled: readonly string[];
  /** What the verdict rests on. */
  readonly scannedThreads: number;
  readonly scannedBytes: number;
}

/**
 * Looks for live pointers into `ranges`: the RIP of every vCPU in kernel mode, and every aligned 8-byte value
 * in the live part of every kernel stack, be it of a thread that runs, waits or is ready, of an idle thread, or
 * of a processor (DPC, ISR, IST). To be called on a quiescent guest. The code in the ranges must hold no call.
 *
 * What a thread saved below its stack pointer is dead and not looked at. Terminated threads are skipped unless
 * a vCPU still runs them. What is paged out of the stack of a thread that waits in user mode does not count.
 *
 * The verdict is `unsettled`, unless something lives in a range, when any other stack is not in memory, when a list
 * or structure does not add up (its vCPU may have been paused in the middle of a change), or when there are more
 * than 65,536 threads, 65,536 earlier stacks, or 256 MB of stacks.
 *
 * @throws MemtablesError `INVALID_ARGUMENT` for an empty range
 */
export function scanGuest(hypervisor: Hypervisor, kernel: Kernel, ranges: readonly LiveRange[]): ScanResult {
  return new Scan(kernel, new RangeSet(ranges)).run(hypervisor);
}

class Scan {
  private readonly findings: Finding[] = [];
  private readonly unsettled = new Set<string>();
  private readonly threads = new Map<Gva, Thread>();
  private readonly idleThreads = new Set<Gva>();
  /** The current threads of all processors. */
  private readonly onProcessor = new Set<Gva>();
  private readonly scannedThreads = new Set<Gva>();
  private scannedBytes = 0;
  private earlierStacks = 0;

  constructor(
    private readonly kernel: Kernel,
    private readonly ranges: RangeSet,
  ) {}

  run(hypervisor: Hypervisor): ScanResult {
    this.attempt('the list of processes', () => this.listThreads());
    for (const { processor, registers } of this.readProcessors(hypervisor)) {
      if (this.isTooMuch()) break;
      this.attempt(`vCPU ${processor.vcpu}`, () => this.scanProcessor(processor, registers));
    }
    for (const thread of this.threads.values()) {
      if (this.onProcessor.has(thread.gva)) continue;
      if (this.isTooMuch()) break;
      this.attempt(describe(thread), () => this.scanSwitchedOut(thread));
    }
    return {
      verdict: this.findings.length > 0 ? 'blocked' : this.unsettled.size > 0 ? 'unsettled' : 'safe',
      findings: this.findings,
      unsettled: [...this.unsettled],
      scannedThreads: this.scannedThreads.size,
      scannedBytes: this.scannedBytes,
    };
  }

  /** Does a part of the scan; where `what` does not add up, the rest is still looked at. */
  private attempt(what: string, part: () => void): void {
    try {
      part();
    } catch (error) {
      if (!(error instanceof MemtablesError && IN_MID_CHANGE.has(error.code))) throw error;
      this.doubt(error.code === 'GUEST_MEMORY_UNMAPPED' ? `${what}: ${error.message}` : error.message);
    }
  }

  private listThreads(): void {
    for (const process of processes(this.kernel)) {
      this.attempt(`the threads of process ${describeProcess(process)}`, () => {
        for (const thread of threads(this.kernel, process)) this.threads.set(thread.gva, thread);
      });
      if (this.threads.size > MAX_THREADS) {
        this.doubt(`the guest has more than ${MAX_THREADS} threads`);
        return;
      }
    }
  }

  /** To be asked before anything more is looked at. */
  private isTooMuch(): boolean {
    if (this.scannedBytes >= MAX_SCANNED_BYTES) {
      this.doubt(`the guest has more than ${MAX_SCANNED_BYTES} bytes of stacks`);
      return true;
    }
    if (this.earlierStacks >= MAX_EARLIER_STACKS) {
      this.doubt(`the guest has more than ${MAX_EARLIER_STACKS} earlier stacks`);
      return true;
    }
    return false;
  }

  /** Looks at every RIP, and adds the threads that are in no list: idle ones, and what runs regardless. */
  private readProcessors(hypervisor: Hypervisor): { processor: Processor; registers: Registers }[] {
    const running: { processor: Processor; registers: Registers }[] = [];
    for (let vcpu = 0; vcpu < hypervisor.vcpuCount; vcpu++) {
      const registers = hypervisor.registers(vcpu);
      if (!isActive(registers)) continue;
      if (!inUserMode(registers)) {
        const range = this.ranges.find(registers.rip);
        if (range !== undefined)
          this.report({ kind: 'vcpu-rip', value: registers.rip, range, isRip: true, vcpu });
      }
      this.attempt(`vCPU ${vcpu}`, () => {
        const processor = findProcessor(this.kernel, vcpu, registers);
        if (processor === undefined) {
          this.doubt(`vCPU ${vcpu} has no processor block yet`);
          return;
        }
        this.idleThreads.add(processor.idleThread);
        this.onProcessor.add(processor.currentThread);
        for (const gva of [processor.idleThread, processor.currentThread]) {
          if (!this.threads.has(gva)) this.threads.set(gva, readThread(this.kernel, gva));
        }
        running.push({ processor, registers });
      });
    }
    return running;
  }

  private scanProcessor(processor: Processor, registers: Registers): void {
    const hasStack = ({ gva, state }: Thread) =>
      state !== ThreadState.Terminated || this.onProcessor.has(gva);
    const threadAt = (address: Gva) => {
      for (const thread of this.threads.values()) {
        if (hasStack(thread) && address >= thread.stackLimit && address < thread.stackBase) return thread;
      }
      return undefined;
    };
    const thread = this.threads.get(processor.currentThread)!;
    const stacks = liveStacks(this.kernel, processor, registers, thread, threadAt);
    if (typeof stacks === 'string') {
      this.doubt(stacks);
      return;
    }
    for (const stack of stacks) this.scanStack(stack);
    this.scanEarlierStacks(thread);
  }

  private scanSwitchedOut(thread: Thread): void {
    if (thread.state === ThreadState.Terminated) return;
    // An idle thread is never marked as anything else.
    if (thread.state === ThreadState.Running && !this.idleThreads.has(thread.gva)) {
      this.doubt(`${describe(thread)} runs, but on no vCPU`);
      return;
    }
    const start = liveAbove(savedStackPointer(thread));
    this.scanStack({ kind: 'thread-stack', start, end: thread.stackBase, settledAbove: start, thread });
    this.scanEarlierStacks(thread);
  }

  private scanEarlierStacks(thread: Thread): void {
    try {
      for (const earlier of earlierStacks(this.kernel, thread)) {
        if (this.isTooMuch()) return;
        this.earlierStacks++;
        const end = earlier.stackBase;
        // Of the current stack all of this has been looked at.
        if (end === thread.stackBase) continue;
        const start = liveAbove(savedStackPointer(earlier));
        this.scanStack({ kind: 'thread-stack', start, end, settledAbove: start, thread });
      }
    } catch (error) {
      if (!isUnmapped(error) || !this.isSwappedOut(thread)) throw error;
    }
  }

  private scanStack(stack: LiveStack): void {
    const { kind, start, end, vcpu, thread } = stack;
    for (let at = start; at < end; ) {
      const length = Math.min(PAGE_SIZE - pageOffset(at), Number(end - at));
      const bytes = this.readPage(at, length);
      if (bytes === undefined) {
        if (thread !== undefined && this.isSwappedOut(thread)) {
          at += BigInt(length);
          continue;
        }
        const owner = thread === undefined ? `vCPU ${vcpu}` : describe(thread);
        this.doubt(`a stack of ${owner} is not in memory at ${hex(at)}`);
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
          stack,
          ...(vcpu === undefined ? {} : { vcpu }),
          ...(thread === undefined ? {} : { thread }),
        });
      });
      this.scannedBytes += length;
      at += BigInt(length);
    }
    if (thread !== undefined) this.scannedThreads.add(thread.gva);
  }

  /**
   * Whether what is missing of a thread's stacks was paged out, and holds nothing that counts.
   *
   * NT pages out the kernel stacks of threads that wait in user mode. Such a thread came in by a system call, and by
   * calls alone to its wait: what can interrupt a frame and then wait on top of it (a page fault, a kernel APC) waits
   * in kernel mode. So each of its frames is of code that calls, and ours does not. A thread whose wait is over is
   * not `Waiting` any more, and gets its stack back before it runs.
   */
  private isSwappedOut(thread: Thread): boolean {
    return !this.onProcessor.has(thread.gva) && waitsInUserMode(this.kernel, thread);
  }

  private readPage(gva: Gva, length: number): Buffer | undefined {
    return unlessUnmapped(() => this.kernel.memory.read(gva, length));
  }

  private isRip(where: Gva): boolean {
    return unlessUnmapped(() => readMachineFrame(this.kernel.memory, where) !== undefined) ?? true;
  }

  private doubt(reason: string): void {
    if (this.unsettled.size < MAX_REPORTED) this.unsettled.add(reason);
  }

  private report(finding: Finding): void {
    if (this.findings.length < MAX_REPORTED) this.findings.push(finding);
    else this.doubt(`there are more than ${MAX_REPORTED} live pointers`);
  }
}

function unlessUnmapped<T>(read: () => T): T | undefined {
  try {
    return read();
  } catch (error) {
    if (isUnmapped(error)) return undefined;
    throw error;
  }
}

function isUnmapped(error: unknown): boolean {
  return error instanceof MemtablesError && error.code === 'GUEST_MEMORY_UNMAPPED';
}

function describe(thread: Thread): string {
  return `thread ${thread.tid} of process ${describeProcess(thread.process)}`;
}

import type { Kernel } from '../nt/kernel.js';
import type { Processor } from '../nt/processors.js';
import { checkedStack, type Stack, type Thread } from '../nt/threads.js';
import { type Gva, hex, PAGE_SIZE, pageBase } from '../vmi/address.js';
import { inUserMode, type Registers } from '../x86/registers.js';

/**
 * Only the upper end of a processor's DPC, ISR and IST stacks is recorded. NT gives them up to 24 KB; more
 * costs nothing, as the search ends at the first page that is not mapped.
 */
const MAX_PROCESSOR_STACK_BYTES = 16n * BigInt(PAGE_SIZE);
const VALUE_ALIGNMENT_MASK = 7n;

export type StackKind = 'thread-stack' | 'dpc-stack' | 'isr-stack' | 'ist-stack';

/** The part of a stack that can hold live values. */
export interface LiveStack {
  readonly kind: StackKind;
  /** 8-byte aligned. */
  readonly start: Gva;
  /** Exclusive. */
  readonly end: Gva;
  /**
   * What interrupted code was stopped with has all been saved, and none of it given back yet, where that lies above:
   * the code that does either has its RSP at the frame.
   */
  readonly settledAbove: Gva;
  readonly vcpu?: number;
  readonly thread?: Thread;
}

/** The live part of a stack whose stack pointer is `rsp`. */
export function liveAbove(rsp: Gva): Gva {
  return rsp & ~VALUE_ALIGNMENT_MASK;
}

/** Which threads have a stack, found by an address in it. */
export type ThreadsByStack = (address: Gva) => Thread | undefined;

/**
 * The live stacks of one vCPU; `thread` is the current thread of its processor.
 *
 * Which of them are live follows from RSP. On the stack of the current thread, nothing below has been switched
 * away from. On a stack of the processor, what was interrupted can lie on any of the others, at a place that is
 * not recorded: they count as a whole.
 *
 * @returns a reason instead, when RSP is on none of them: the vCPU is in the middle of a context switch, or of
 * an entry into the kernel
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID` when the thread's stack cannot be one
 */
export function liveStacks(
  kernel: Kernel,
  processor: Processor,
  registers: Registers,
  thread: Thread,
  threadAt: ThreadsByStack,
): readonly LiveStack[] | string {
  const { vcpu } = processor;
  const { rsp } = registers;
  const stack = checkedStack(thread);
  const onThread = { kind: 'thread-stack', end: stack.base, vcpu, thread } as const;

  if (inUserMode(registers)) {
    const start = kernelEntry(processor, thread, stack);
    return [{ ...onThread, start, settledAbove: start }];
  }
  if (rsp >= stack.limit && rsp < stack.base) {
    return [{ ...onThread, start: liveAbove(rsp), settledAbove: rsp }];
  }
  const other = threadAt(rsp);
  if (other !== undefined) return `vCPU ${vcpu} is between thread ${other.tid} and thread ${thread.tid}`;

  const stacks = processorStacks(processor);
  const current = stacks.find(
    ({ end }) => rsp < end && lowestMapped(kernel, end, MAX_PROCESSOR_STACK_BYTES) <= rsp,
  );
  if (current === undefined) return `vCPU ${vcpu} is on an unknown stack at ${hex(rsp)}`;
  const whole = <T extends { readonly end: Gva }>(other: T, limit: bigint) => {
    const start = lowestMapped(kernel, other.end, limit);
    // An NMI has a stack of its own and interrupts whatever saves registers; who else has switched stacks has saved them.
    return { ...other, start, settledAbove: current.kind === 'ist-stack' ? other.end : start };
  };
  return [
    whole(onThread, stack.base - stack.limit),
    ...stacks.map((each) =>
      each === current
        ? { ...each, start: liveAbove(rsp), settledAbove: rsp }
        : whole(each, MAX_PROCESSOR_STACK_BYTES),
    ),
  ];
}

/**
 * Where the kernel begins to push when a thread in user mode enters it. What lies above is live: the frames
 * around a call back into user mode.
 */
function kernelEntry({ rsp0, rspBase }: Processor, { initialStack }: Thread, stack: Stack): Gva {
  const entries = [rsp0, rspBase, initialStack].filter((at) => at > stack.limit && at <= stack.base);
  // Under KVA shadow RSP0 leads elsewhere; with no entry known the whole stack counts.
  return entries.sort((a, b) => Number(a - b))[0] ?? stack.limit;
}

function processorStacks({
  vcpu,
  dpcStack,
  isrStack,
  ist,
}: Processor): { kind: StackKind; end: Gva; vcpu: number }[] {
  return [
    { kind: 'dpc-stack' as const, end: dpcStack, vcpu },
    { kind: 'isr-stack' as const, end: isrStack, vcpu },
    ...ist.map((end) => ({ kind: 'ist-stack' as const, end, vcpu })),
  ].filter(({ end }) => end !== 0n);
}

/** The lower end of the mapped memory below `top`: the first page that starts `limit` bytes away or further. */
function lowestMapped(kernel: Kernel, top: Gva, limit: bigint): Gva {
  let lowest = top;
  while (top - lowest < limit && kernel.memory.isMapped(lowest - 1n)) lowest = pageBase(lowest - 1n);
  return lowest;
}

import { type Gva, hex } from '../vmi/address.js';
import type { Kernel } from './kernel.js';
import { walkList } from './list.js';
import { type Process, readProcess } from './processes.js';
import { isKernelAddress, kernelPointer, Layout, structureInvalid } from './structure.js';

/** More threads in one process than its handle table and memory allow. */
const MAX_THREADS_PER_PROCESS = 0x1_0000;
/** NT's large stacks have 72 KB. */
const MAX_STACK_BYTES = 0x2_0000n;
const STACK_ALIGNMENT = 8n;
/** NT lets a thread nest far fewer expansions and calls back into user mode. */
const MAX_STACK_SEGMENTS = 256;
/** CLIENT_ID is UniqueProcess, UniqueThread: part of the public ABI. */
const CLIENT_ID_SIZE = 16;
const UNIQUE_THREAD = 8;

/** The KTHREAD_STATE values that matter here. */
export const ThreadState = { Running: 2, Terminated: 4, Waiting: 5 } as const;
/** The KPROCESSOR_MODE of a wait on behalf of a user program. */
const USER_MODE = 1;

export interface Thread {
  /** Its ETHREAD, which is its KTHREAD too. */
  readonly gva: Gva;
  readonly process: Process;
  readonly tid: bigint;
  readonly state: number;
  /** The saved stack pointer; stale while the thread runs. */
  readonly kernelStack: Gva;
  readonly initialStack: Gva;
  /** Exclusive upper end and inclusive lower end of its kernel stack; see `checkedStack`. */
  readonly stackBase: Gva;
  readonly stackLimit: Gva;
}

export interface Stack {
  /** Exclusive upper end. */
  readonly base: Gva;
  /** Inclusive lower end. */
  readonly limit: Gva;
}

/**
 * Every thread in the list of `process`, terminated ones too.
 *
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID`, `GUEST_MEMORY_UNMAPPED` when the list does not add up
 */
export function* threads(kernel: Kernel, process: Process): Generator<Thread> {
  const { memory, profile } = kernel;
  const head = process.gva + BigInt(profile.offset('_EPROCESS', 'ThreadListHead'));
  const links = BigInt(profile.offset('_ETHREAD', 'ThreadListEntry'));
  for (const entry of walkList(memory, head, MAX_THREADS_PER_PROCESS, `threads of process ${process.pid}`)) {
    const gva = entry - links;
    const thread = readThreadOf(kernel, gva, process);
    if (thread === undefined) {
      throw structureInvalid(`the thread at ${hex(gva)} is in the list of a process that is not its own`, {
        thread: gva,
        process: process.gva,
      });
    }
    yield thread;
  }
}

/** The thread whose ETHREAD is at `gva`, listed or not. @throws as `threads` does */
export function readThread(kernel: Kernel, gva: Gva): Thread {
  kernelPointer(gva, 'an ETHREAD');
  const owner = new Layout(kernel.profile, '_KTHREAD', { Process: 8 })
    .read(kernel.memory, gva)
    .u64('Process');
  return readThreadOf(kernel, gva, readProcess(kernel, owner))!;
}

function readThreadOf(kernel: Kernel, gva: Gva, process: Process): Thread | undefined {
  kernelPointer(gva, 'an ETHREAD');
  // KTHREAD is the first member of ETHREAD.
  const fields = new Layout(kernel.profile, '_KTHREAD', {
    InitialStack: 8,
    StackLimit: 8,
    StackBase: 8,
    KernelStack: 8,
    State: 1,
    Process: 8,
  }).read(kernel.memory, gva);
  if (fields.u64('Process') !== process.gva) return undefined;
  const cid = new Layout(kernel.profile, '_ETHREAD', { Cid: CLIENT_ID_SIZE }).read(kernel.memory, gva);
  return {
    gva,
    process,
    tid: cid.bytesOf('Cid', CLIENT_ID_SIZE).readBigUInt64LE(UNIQUE_THREAD),
    state: fields.u8('State'),
    kernelStack: fields.u64('KernelStack'),
    initialStack: fields.u64('InitialStack'),
    stackBase: fields.u64('StackBase'),
    stackLimit: fields.u64('StackLimit'),
  };
}

/**
 * Whether a thread waits in user mode (the WaitMode of its KTHREAD): NT takes away the kernel stacks of such threads
 * only. False when the profile does not have that field.
 *
 * @throws MemtablesError `GUEST_MEMORY_UNMAPPED`
 */
export function waitsInUserMode({ memory, profile }: Kernel, thread: Thread): boolean {
  if (thread.state !== ThreadState.Waiting || !profile.hasField('_KTHREAD', 'WaitMode')) return false;
  return memory.readU8(thread.gva + BigInt(profile.offset('_KTHREAD', 'WaitMode'))) === USER_MODE;
}

/**
 * The bounds of a thread's kernel stack. Only a thread that is not terminated, or still runs, has one.
 *
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID` when they cannot be those of a stack
 */
export function checkedStack(thread: Thread): Stack {
  const { stackBase: base, stackLimit: limit } = thread;
  const sane =
    isKernelAddress(limit) &&
    isKernelAddress(base) &&
    limit < base &&
    base - limit <= MAX_STACK_BYTES &&
    base % STACK_ALIGNMENT === 0n &&
    limit % STACK_ALIGNMENT === 0n;
  if (!sane) {
    throw structureInvalid(
      `thread ${thread.tid} of process ${thread.process.pid} has no possible stack: ${hex(limit)} to ${hex(base)}`,
      { thread: thread.gva, stackLimit: limit, stackBase: base },
    );
  }
  return { base, limit };
}

/**
 * The stack pointer of a thread that no vCPU runs.
 *
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID` when it lies outside the thread's stack
 */
export function savedStackPointer(thread: Thread): Gva {
  const { base, limit } = checkedStack(thread);
  if (thread.kernelStack < limit || thread.kernelStack > base) {
    throw structureInvalid(
      `thread ${thread.tid} of process ${thread.process.pid} saved a stack pointer outside its stack: ${hex(thread.kernelStack)}`,
      { thread: thread.gva, kernelStack: thread.kernelStack, stackLimit: limit, stackBase: base },
    );
  }
  return thread.kernelStack;
}

/**
 * The thread as it was on each of its earlier stacks, the latest first: on another one before its kernel stack was
 * expanded, on the same before a call back into user mode. At most 256.
 *
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID`, `GUEST_MEMORY_UNMAPPED` when the chain does not add up
 */
export function* earlierStacks(kernel: Kernel, thread: Thread): Generator<Thread> {
  const { memory, profile } = kernel;
  if (!profile.hasField('_KSTACK_CONTROL', 'Previous')) return;
  const previous = BigInt(profile.offset('_KSTACK_CONTROL', 'Previous'));
  const segment = new Layout(profile, '_KERNEL_STACK_SEGMENT', {
    StackBase: 8,
    StackLimit: 8,
    KernelStack: 8,
    InitialStack: 8,
  });
  // Every stack begins with a KSTACK_CONTROL, at what is the initial stack pointer.
  let control = thread.initialStack;
  for (let depth = 0; depth < MAX_STACK_SEGMENTS; depth++) {
    kernelPointer(control, `an initial stack of thread ${thread.tid}`);
    const fields = segment.read(memory, control + previous);
    const base = fields.u64('StackBase');
    if (base === 0n) return;
    control = fields.u64('InitialStack');
    yield {
      ...thread,
      stackBase: base,
      stackLimit: fields.u64('StackLimit'),
      kernelStack: fields.u64('KernelStack'),
      initialStack: control,
    };
  }
  throw structureInvalid(`thread ${thread.tid} has more than ${MAX_STACK_SEGMENTS} stacks`, {
    thread: thread.gva,
  });
}

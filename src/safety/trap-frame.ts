import type { Kernel } from '../nt/kernel.js';
import { type Gva, pageBase } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import type { GprName } from '../x86/registers.js';
import {
  MACHINE_FRAME_BYTES,
  type MachineFrame,
  machineFrameBelow,
  readMachineFrame,
} from './machine-frame.js';
import type { Finding } from './scan.js';
import type { LiveStack } from './stacks.js';

/** NT's KGDT64_R0_DATA; the processor makes it null where it enters the kernel from user mode. */
const STACK_SELECTORS: ReadonlySet<number> = new Set([0x18, 0]);

const TYPE = '_KTRAP_FRAME';
/** What NT saves for every interrupt and exception. */
const FIELDS = {
  rip: 'Rip',
  rax: 'Rax',
  rcx: 'Rcx',
  rdx: 'Rdx',
  r8: 'R8',
  r9: 'R9',
  r10: 'R10',
  r11: 'R11',
  rbp: 'Rbp',
} as const satisfies Partial<Record<GprName | 'rip', string>>;
const REGISTER_BYTES = 8;
const MXCSR = 'MxCsr';
/** What the kernel computes with, but for the flags of exceptions that it masks. */
const KERNEL_MXCSR = 0x1f80;
const MXCSR_FLAGS = 0x3f;

/** How far apart the RIP and RSP of a copy are: 0x60 bytes in a CONTEXT, the furthest. */
const COPY_REACH = 0x100;

type KnownRegisters = Readonly<Partial<Record<GprName, bigint>>> & { readonly rip: Gva };

interface Saved {
  readonly bytes: Buffer;
  /** Where in them the registers lie. */
  readonly offsets: ReadonlyMap<string, number>;
}

/** What a stack holds of kernel code that was interrupted, and will give back to it. */
export class TrapFrame {
  private constructor(
    private readonly kernel: Kernel,
    private readonly start: Gva,
    private readonly end: Gva,
    private readonly saved: Saved,
    /** What the code goes on with, as far as the frame tells. */
    readonly registers: KnownRegisters & { readonly rsp: Gva },
  ) {}

  /**
   * The frame of a RIP that a scan has found; `undefined` where the processor cannot have pushed one: it may be a copy
   * of one, or anything else. Nothing but RIP is to be changed where what surrounds it is no KTRAP_FRAME, or none yet or
   * no more.
   */
  static of(kernel: Kernel, { where, stack }: Finding): TrapFrame | undefined {
    if (where === undefined || stack === undefined) return undefined;
    const { memory } = kernel;
    const end = where + BigInt(MACHINE_FRAME_BYTES);
    if (end > stack.end || !memory.isMapped(end - 1n)) return undefined;
    const frame = readMachineFrame(memory, where);
    if (frame === undefined || !isPushed(frame, where, stack)) return undefined;
    const saved = readAround(kernel, frame, where, stack) ?? {
      bytes: memory.read(where, MACHINE_FRAME_BYTES),
      offsets: new Map([['rip', 0]]),
    };
    const values = [...saved.offsets].map(([name, offset]) => [name, saved.bytes.readBigUInt64LE(offset)]);
    const { rip, rsp } = frame;
    return new TrapFrame(kernel, end - BigInt(saved.bytes.length), end, saved, {
      ...Object.fromEntries(values),
      rip,
      rsp,
    });
  }

  /** Whether what lies at `where` is a part of it. */
  holds(where: Gva): boolean {
    return where >= this.start && where < this.end;
  }

  /**
   * Whether a value elsewhere, the same as this RIP, can belong to a copy of the frame, as exceptions are given one: then
   * RSP lies near by.
   */
  mayBeCopiedAt({ where, stack }: Finding): boolean {
    if (where === undefined || stack === undefined) return false;
    const isBelow = where < this.start;
    const before = Math.min(
      COPY_REACH,
      Number(where - stack.start),
      isBelow ? COPY_REACH : Number(where - this.end),
    );
    const behind = Math.min(
      COPY_REACH,
      Number(stack.end - where),
      isBelow ? Number(this.start - where) : COPY_REACH,
    );
    const rsp = Buffer.alloc(REGISTER_BYTES);
    rsp.writeBigUInt64LE(this.registers.rsp);
    return this.kernel.memory.readIfMapped(where - BigInt(before), before + behind)?.includes(rsp) ?? true;
  }

  /**
   * Changes what the code goes on with. Returns false, and changes nothing, where a register is not in the frame, or
   * where they cannot all be changed at once.
   *
   * With a part of the changes the code would go astray, should this process end in between: they are written by one
   * call, and have to lie on one page for that. Nobody takes them back: the code goes on elsewhere, and the frame with
   * it.
   *
   * @throws MemtablesError `HYPERVISOR_FAILED`
   */
  change(hypervisor: Hypervisor, changes: KnownRegisters): boolean {
    const bytes = Buffer.from(this.saved.bytes);
    let first = bytes.length;
    let end = 0;
    for (const [name, value] of Object.entries(changes)) {
      const offset = this.saved.offsets.get(name);
      if (offset === undefined) return false;
      bytes.writeBigUInt64LE(value, offset);
      first = Math.min(first, offset);
      end = Math.max(end, offset + REGISTER_BYTES);
    }
    const gva = this.start + BigInt(first);
    if (pageBase(gva) !== pageBase(this.start + BigInt(end - 1))) return false;
    hypervisor.writePhysical(this.kernel.memory.translate(gva), bytes.subarray(first, end));
    return true;
  }
}

/**
 * Whether the processor has pushed the frame where it lies: below the RSP that it interrupted, or at the top of a stack
 * that it switched to.
 */
function isPushed(frame: MachineFrame, where: Gva, { kind, end }: LiveStack): boolean {
  const isAtTop = kind === 'ist-stack' && where === machineFrameBelow(end);
  return STACK_SELECTORS.has(frame.ss) && (isBelowInterrupted(frame, where) || isAtTop);
}

function isBelowInterrupted({ rsp }: MachineFrame, where: Gva): boolean {
  return where === machineFrameBelow(rsp);
}

/** The KTRAP_FRAME around a machine frame, if there is one to rely on. */
function readAround(
  { memory, profile }: Kernel,
  frame: MachineFrame,
  where: Gva,
  { settledAbove }: LiveStack,
): Saved | undefined {
  // An interrupt with a stack of its own may have a layout of its own, too.
  if (!isBelowInterrupted(frame, where)) return undefined;
  if (![...Object.values(FIELDS), MXCSR].every((field) => profile.hasField(TYPE, field))) return undefined;
  const rip = profile.offset(TYPE, FIELDS.rip);
  const start = where - BigInt(rip);
  if (start <= settledAbove) return undefined;
  const bytes = memory.readIfMapped(start, rip + MACHINE_FRAME_BYTES);
  if (bytes === undefined) return undefined;
  // The registers lie between it and the machine frame: of what is left of a dead frame, or was made up by a program,
  // both may be there by chance, but not with live data of somebody else between them.
  const mxcsr = bytes.readUInt32LE(profile.offset(TYPE, MXCSR));
  if ((mxcsr & ~MXCSR_FLAGS) !== KERNEL_MXCSR) return undefined;
  const offsets = Object.entries(FIELDS).map(([name, field]) => [name, profile.offset(TYPE, field)] as const);
  return { bytes, offsets: new Map(offsets) };
}

// Exceptions that the guest's own code causes reach the guest, as a CPU would raise them.
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Machine } from '../../src/machine/machine.js';
import type { Gva } from '../../src/vmi/address.js';
import type { Registers } from '../../src/x86/registers.js';
import {
  CODE,
  createFlatMachine,
  DATA,
  handlerOf,
  hexBytes,
  interruptStackOf,
  KERNEL_BASE,
  pageDirectoryEntry,
  SELECTORS,
  setGate,
  systemArea,
} from './support.js';

/** 2 MB each: present or not, as a test makes them. */
const REGION = 0x40_0000n;
const NEXT_REGION = 0x60_0000n;
const UNMAPPED = 0x8000_0000n;
const NON_CANONICAL = 0x0123_4567_89ab_cdefn;

const PRESENT = 1n;
const WRITABLE = 2n;
const USER = 4n;
const ACCESSED = 0x20n;
const DIRTY = 0x40n;
const LARGE = 0x80n;
const NO_EXECUTE = 1n << 63n;

let machine: Machine;
beforeEach(() => {
  machine = createFlatMachine({ vcpus: 2 });
});
afterEach(() => machine.close());

type Mode = 'stepped' | 'free running';

function setEntry(region: bigint, flags: bigint): void {
  const entry = Buffer.alloc(8);
  entry.writeBigUInt64LE(region | LARGE | flags);
  machine.writePhysical(pageDirectoryEntry(machine, region), entry);
}

function readEntry(region: bigint): bigint {
  return machine.readPhysical(pageDirectoryEntry(machine, region), 8).readBigUInt64LE();
}

function run(mode: Mode, code: string, registers: Partial<Registers> = {}): void {
  machine.writePhysical(CODE, hexBytes(`${code}f4`));
  machine.setRegisters(0, { rip: CODE, ...registers });
  if (mode === 'stepped') machine.step(0, 1000);
  else while (!machine.run(10_000).idle);
}

/** Enters user mode at `CODE + 0x100`, with these bytes there. */
function runAsUser(mode: Mode, code: string, registers: Partial<Registers> = {}): Gva {
  const user = CODE + 0x100n;
  machine.writePhysical(user, hexBytes(code));
  const frame = Buffer.alloc(40);
  for (const [index, value] of [user, SELECTORS.userCode, 2n, DATA + 0x800n, SELECTORS.userData].entries()) {
    frame.writeBigUInt64LE(value, index * 8);
  }
  machine.writePhysical(DATA, frame);
  run(mode, '48cf', { rsp: DATA, ...registers });
  return user;
}

/** The exception that the vCPU has halted in the handler of. */
function raised(vcpu = 0): { vector: number; rip: Gva; errorCode?: bigint } {
  const { rip, rsp } = machine.registers(vcpu);
  const vector = Number((rip - handlerOf(machine, 0)) / 0x10n);
  const stack = machine.readPhysical(rsp - KERNEL_BASE, 16);
  if (![8, 10, 11, 12, 13, 14, 17].includes(vector)) return { vector, rip: stack.readBigUInt64LE(0) };
  return { vector, errorCode: stack.readBigUInt64LE(0), rip: stack.readBigUInt64LE(8) };
}

// nop; and two more, so that the instruction is in the middle of a block
const BEFORE = '90 ffc0 90';
const AT = CODE + 4n;

describe.each(['stepped', 'free running'] as const)('an exception (%s)', (mode) => {
  it.each<[string, string, { vector: number; errorCode?: bigint; behind?: bigint }, Partial<Registers>?]>([
    ['#DE of a division by zero', 'f7f1', { vector: 0 }, { rcx: 0n }],
    ['#DE of a quotient too large', '48f7f1', { vector: 0 }, { rcx: 1n, rdx: 2n }],
    ['#BP, behind the instruction', 'cc', { vector: 3, behind: 1n }],
    ['INT n, behind the instruction', 'cd30', { vector: 0x30, behind: 2n }],
    ['#UD', '0f0b', { vector: 6 }],
    ['#UD of an instruction that 64-bit mode has not', '06', { vector: 6 }],
    ['#GP of a non-canonical load', '488b03', { vector: 13, errorCode: 0n }, { rbx: NON_CANONICAL }],
    [
      '#GP of a non-canonical jump, at its target',
      'ffe3',
      { vector: 13, errorCode: 0n },
      { rbx: NON_CANONICAL },
    ],
    [
      '#GP of a selector, which is the error code',
      '8ed8',
      { vector: 13, errorCode: 0x1000n },
      { rax: 0xfffn },
    ],
  ])('%s', (_, code, expected, registers = {}) => {
    run(mode, BEFORE + code, registers);
    const { behind = 0n, ...rest } = expected;
    const rip = code === 'ffe3' ? NON_CANONICAL : AT + behind;
    expect(raised()).toEqual({ ...rest, rip });
  });

  describe('#PF', () => {
    it.each<[string, string, bigint, bigint, Partial<Registers>?]>([
      ['a load', '488b03', 0n, UNMAPPED],
      ['a store', '488903', 2n, UNMAPPED],
      ['a read-modify-write', '480103', 2n, UNMAPPED],
      ['the address in the page, not only the page', '488b83f5070000', 0n, UNMAPPED + 0x7f5n],
      ['a push', '50', 2n, UNMAPPED - 8n, { rsp: UNMAPPED }],
      ['a string store', 'f3aa', 2n, UNMAPPED + 3n, { rdi: UNMAPPED + 3n, rcx: 5n }],
    ])('of nothing mapped, for %s', (_, code, errorCode, cr2, registers = {}) => {
      // A stack of its own, since one case has none.
      setGate(machine, 14, handlerOf(machine, 14), { ist: 1 });
      run(mode, BEFORE + code, { rbx: UNMAPPED, ...registers });
      const seen = raised();
      // Real CPUs report the load of a read-modify-write as a write; this one meets the load first.
      expect(seen).toEqual({ vector: 14, errorCode: code === '480103' ? 0n : errorCode, rip: AT });
      expect(machine.registers(0).cr2).toBe(cr2);
    });

    it('of the second page of a crossing access has that page’s address', () => {
      setEntry(NEXT_REGION, 0n);
      run(mode, `${BEFORE}488903`, { rbx: NEXT_REGION - 3n, rax: 0xffff_ffff_ffff_ffffn });
      expect(raised()).toEqual({ vector: 14, errorCode: 2n, rip: AT });
      expect(machine.registers(0).cr2).toBe(NEXT_REGION);
      expect(machine.readPhysical(NEXT_REGION - 3n, 3)).toEqual(Buffer.alloc(3));
    });

    it('of a write to a read-only page', () => {
      setEntry(REGION, PRESENT);
      run(mode, `${BEFORE}488903`, { rbx: REGION + 8n });
      expect(raised()).toEqual({ vector: 14, errorCode: 3n, rip: AT });
    });

    it('of a fetch from a no-execute page, and from no page', () => {
      setEntry(REGION, PRESENT | WRITABLE | NO_EXECUTE);
      for (const [target, errorCode] of [
        [REGION + 0x123n, 0x11n],
        [UNMAPPED + 0x123n, 0x10n],
      ] as const) {
        run(mode, `${BEFORE}ffe3`, { rbx: target });
        expect(raised()).toEqual({ vector: 14, errorCode, rip: target });
        expect(machine.registers(0).cr2).toBe(target);
      }
    });

    it('of an instruction that crosses into no page', () => {
      setEntry(NEXT_REGION, 0n);
      machine.writePhysical(NEXT_REGION - 2n, hexBytes('b805'));
      run(mode, 'ffe3', { rbx: NEXT_REGION - 2n });
      expect(raised()).toEqual({ vector: 14, errorCode: 0x10n, rip: NEXT_REGION - 2n });
      expect(machine.registers(0).cr2).toBe(NEXT_REGION);
    });

    it('of a reserved bit in an entry, and of an entry that leads out of memory', () => {
      setEntry(REGION, PRESENT | WRITABLE | 0x4000n);
      run(mode, `${BEFORE}488b03`, { rbx: REGION });
      expect(raised()).toEqual({ vector: 14, errorCode: 9n, rip: AT });
      setEntry(REGION, PRESENT | WRITABLE | (1n << 39n));
      run(mode, `${BEFORE}488b03`, { rbx: REGION });
      expect(raised()).toEqual({ vector: 14, errorCode: 9n, rip: AT });
    });

    it('of user code says so, on a kernel page and on none', () => {
      const at = runAsUser(mode, '488b03', { rbx: KERNEL_BASE + DATA });
      expect(raised()).toEqual({ vector: 14, errorCode: 5n, rip: at });
      runAsUser(mode, '488903', { rbx: UNMAPPED });
      expect(raised()).toEqual({ vector: 14, errorCode: 6n, rip: at });
    });

    it('is handled by the guest, and the instruction runs again', () => {
      setEntry(REGION, 0n);
      const handler = KERNEL_BASE + DATA;
      setGate(machine, 14, handler);
      // mov rax, cr2; mov qword ptr [r8], r9; invlpg [rax]; add rsp, 8; iretq
      machine.writePhysical(DATA, hexBytes('0f20d0 4d8908 0f0138 4883c408 48cf'));
      run(mode, `${BEFORE}c70377777777`, {
        rbx: REGION + 0x10n,
        r8: KERNEL_BASE + pageDirectoryEntry(machine, REGION),
        r9: REGION | LARGE | PRESENT | WRITABLE,
      });
      expect(machine.registers(0)).toMatchObject({ rip: AT + 7n, rax: REGION + 0x10n });
      expect(machine.readPhysical(REGION + 0x10n, 4)).toEqual(Buffer.alloc(4, 0x77));
      expect(readEntry(REGION) & (ACCESSED | DIRTY)).toBe(ACCESSED | DIRTY);
    });
  });

  it('a read marks the page accessed, a write dirty', () => {
    setEntry(REGION, PRESENT | WRITABLE | USER);
    run(mode, '488b03', { rbx: REGION });
    expect(readEntry(REGION) & (ACCESSED | DIRTY)).toBe(ACCESSED);
    run(mode, '488903', { rbx: REGION });
    expect(readEntry(REGION) & (ACCESSED | DIRTY)).toBe(ACCESSED | DIRTY);
  });

  it('user code may not halt, disable interrupts, nor use a kernel’s gate', () => {
    for (const [code, errorCode] of [
      ['f4', 0n],
      ['fa', 0n],
      ['0f20c0', 0n],
      ['cd30', 0x30n * 8n + 2n],
      ['cd03', 3n * 8n + 2n],
      ['cc', 3n * 8n + 2n],
    ] as const) {
      const at = runAsUser(mode, code);
      expect(raised()).toEqual({ vector: 13, errorCode, rip: at });
    }
  });

  it('a second one in a row is no double fault', () => {
    // A #GP handled, then a #DE, then a #GP: each for itself. The handlers step over the instruction.
    const handler = KERNEL_BASE + DATA;
    setGate(machine, 13, handler);
    setGate(machine, 0, handler + 0x40n);
    // inc r15; add rsp, 8; add qword ptr [rsp], 2; iretq
    machine.writePhysical(DATA, hexBytes('49ffc7 4883c408 4883042402 48cf'));
    machine.writePhysical(DATA + 0x40n, hexBytes('49ffc7 4883042402 48cf'));
    run(mode, '8ed8 f7f1 8ed8 f7f1', { rax: 0xfffn, rcx: 0n, r15: 0n });
    expect(machine.registers(0)).toMatchObject({ r15: 4n, rip: CODE + 9n });
  });

  describe('that cannot be delivered', () => {
    const noStack = UNMAPPED + 0x100n;

    it('is a double fault with a stack of its own', () => {
      setGate(machine, 8, handlerOf(machine, 8), { ist: 1 });
      run(mode, `${BEFORE}488b03`, { rbx: UNMAPPED, rsp: noStack });
      expect(raised()).toEqual({ vector: 8, errorCode: 0n, rip: AT });
      expect(machine.registers(0).rsp).toBe(interruptStackOf(machine, 0) - 48n);
    });

    it('because its gate is missing is #NP or a double fault by what it was', () => {
      const gates = systemArea(machine) + 0x5000n;
      machine.writePhysical(gates + 6n * 16n + 5n, Buffer.of(0x0e));
      run(mode, `${BEFORE}0f0b`);
      expect(raised()).toEqual({ vector: 11, errorCode: 6n * 8n + 3n, rip: AT });
      machine.writePhysical(gates, Buffer.alloc(16));
      run(mode, `${BEFORE}f7f1`, { rcx: 0n });
      expect(raised()).toEqual({ vector: 8, errorCode: 0n, rip: AT });
    });

    it('nor its double fault is a failure of the machine that says where, and the other vCPU is still there', () => {
      expect(() => run(mode, `${BEFORE}488b03`, { rbx: UNMAPPED, rsp: noStack })).toThrow(
        expect.objectContaining({
          code: 'MACHINE_FAILED',
          message: 'triple fault',
          context: expect.objectContaining({ vcpu: 0, registers: expect.objectContaining({ rip: AT }) }),
        }),
      );
      machine.pause(0);
      machine.setRegisters(1, { rip: CODE, rbx: DATA });
      expect(machine.step(1, 3).retired).toBe(3);
    });
  });
});

describe('a guest whose handlers raise exceptions without end', () => {
  beforeEach(() => {
    // ud2, on a stack that does not run out
    setGate(machine, 6, KERNEL_BASE + DATA, { ist: 1 });
    machine.writePhysical(DATA, hexBytes('0f0b'));
    machine.setRegisters(0, { rip: KERNEL_BASE + DATA });
  });

  it('does not keep run from returning', () => {
    expect(machine.run(2000)).toEqual({ traps: [], idle: false });
  });

  it('is a failure of step, which could not keep its promise', () => {
    expect(() => machine.step(0, 1)).toThrow(expect.objectContaining({ code: 'MACHINE_FAILED' }));
  });
});

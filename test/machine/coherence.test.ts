// Whoever changes code, and by whatever way: every vCPU executes the new bytes the next time.
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE, type Machine } from '../../src/machine/machine.js';
import type { Gva } from '../../src/vmi/address.js';
import type { Registers } from '../../src/x86/registers.js';
import {
  CODE,
  createFlatMachine,
  DATA,
  handlerOf,
  hexBytes,
  interruptStackSlot,
  KERNEL_BASE,
  kernelStackOf,
  pageDirectoryEntry,
  SCRATCH,
  setAccess,
  setGate,
} from './support.js';

/** Where the code under change lies; `mov eax, imm32; hlt`, whose value is at TARGET + 1. */
const TARGET = DATA;
const VALUE = TARGET + 1n;
const OLD = 0x01010101n;
const NEW = 0x02020202n;
const ALL = 7;

let machine: Machine;
beforeEach(() => {
  machine = createFlatMachine({ vcpus: 2 });
  machine.writePhysical(TARGET, hexBytes('b801010101f4'));
});
afterEach(() => machine.close());

type Mode = 'stepped' | 'free running';

/** What the code at `at` returns in eax. */
function call(vcpu: number, mode: Mode, at: Gva = TARGET): bigint {
  machine.setRegisters(vcpu, { rip: at, rax: 0n });
  if (mode === 'stepped') machine.step(vcpu, 2);
  else runAlone(vcpu);
  const { rax, rip } = machine.registers(vcpu);
  expect(rip).toBe(at + 6n);
  return rax;
}

function runAlone(vcpu: number): void {
  machine.pause(1 - vcpu);
  while (!machine.run(10_000).idle);
  machine.resume(1 - vcpu);
}

/** Both vCPUs, both ways of running, at both addresses: all have the code translated. */
function callAll(): bigint[] {
  return [0, 1].flatMap((vcpu) =>
    (['stepped', 'free running'] as const).flatMap((mode) => [
      call(vcpu, mode),
      call(vcpu, mode, KERNEL_BASE + TARGET),
    ]),
  );
}

function everywhere(value: bigint): bigint[] {
  return Array(8).fill(value);
}

/** Runs other code on one vCPU until it halts, and lets each trap complete. */
function execute(vcpu: number, mode: Mode, code: string, registers: Partial<Registers>): void {
  machine.writePhysical(CODE, Buffer.concat([hexBytes(code), hexBytes('f4')]));
  machine.setRegisters(vcpu, { rip: CODE, ...registers });
  machine.pause(1 - vcpu);
  for (;;) {
    const trap = mode === 'stepped' ? machine.step(vcpu, 100).trap : machine.run(10_000).traps[0];
    if (trap === undefined) break;
    machine.complete(vcpu);
  }
  machine.resume(1 - vcpu);
}

const MODES = ['stepped', 'free running'] as const;

it('a write by the host', () => {
  expect(callAll()).toEqual(everywhere(OLD));
  machine.writePhysical(VALUE, hexBytes('02020202'));
  expect(callAll()).toEqual(everywhere(NEW));
});

it('a write by the host that ends in the page of code, and one that begins in it', () => {
  expect(callAll()).toEqual(everywhere(OLD));
  machine.writePhysical(TARGET - 16n, Buffer.concat([Buffer.alloc(16), hexBytes('b802020202f4')]));
  expect(callAll()).toEqual(everywhere(NEW));
  machine.writePhysical(TARGET, Buffer.concat([hexBytes('b801010101f4'), Buffer.alloc(0x1000)]));
  expect(callAll()).toEqual(everywhere(OLD));
});

describe.each([
  ['mov dword ptr [rbx], imm', 'c70302020202'],
  ['mov byte ptr, four times', 'c60302 c6430102 c6430202 c6430302'],
  ['rep stosb', 'f3aa'],
  ['rep movsb', 'f3a4'],
  ['xchg', '8703'],
  ['lock xadd', 'f00fc103'],
  ['lock cmpxchg', 'f00fb113'],
  ['push', '50'],
  ['movd from SSE', '660f6ec0 660f7e03'],
  ['fistp', 'db06 db1b'],
])('a store by a vCPU with %s', (_, code) => {
  const registers = (target: Gva) => ({
    rax: code === 'f3aa' ? 2n : code === 'f00fc103' ? 0x01010101n : code === 'f00fb113' ? OLD : NEW,
    rcx: 4n,
    rdx: NEW,
    rbx: target,
    rdi: target,
    rsi: SCRATCH,
    // A push of eight bytes: the HLT behind the value comes from rax too.
    rsp: target + 8n,
  });

  for (const mode of MODES) {
    for (const permission of ['free', 'trapped']) {
      for (const base of [0n, KERNEL_BASE]) {
        it(`${mode}, ${permission}, ${base === 0n ? 'at the same address' : 'through an alias'}`, () => {
          machine.writePhysical(SCRATCH, hexBytes('02020202'));
          expect(callAll()).toEqual(everywhere(OLD));
          if (permission === 'trapped') setAccess(machine, TARGET, 1, ACCESS_EXECUTE);
          const state = registers(base + VALUE);
          execute(0, mode, code, code === '50' ? { ...state, rax: 0xf402020202n } : state);
          expect(callAll()).toEqual(everywhere(NEW));
        });
      }
    }
  }
});

it('a store in a page that is trapped for execution too', () => {
  setAccess(machine, TARGET, 1, ACCESS_READ | ACCESS_WRITE);
  const trappedCall = (vcpu: number) => {
    machine.setRegisters(vcpu, { rip: TARGET, rax: 0n });
    expect(machine.step(vcpu, 1).trap).toMatchObject({ access: 'execute' });
    machine.complete(vcpu);
    return machine.registers(vcpu).rax;
  };
  expect([trappedCall(0), trappedCall(1)]).toEqual([OLD, OLD]);
  execute(0, 'stepped', 'c70302020202', { rbx: VALUE });
  expect([trappedCall(0), trappedCall(1)]).toEqual([NEW, NEW]);
  machine.writePhysical(VALUE, hexBytes('03030303'));
  expect([trappedCall(0), trappedCall(1)]).toEqual([0x03030303n, 0x03030303n]);
  setAccess(machine, TARGET, 1, ALL);
  machine.writePhysical(VALUE, hexBytes('04040404'));
  expect(callAll()).toEqual(everywhere(0x04040404n));
});

it('the frame of an interrupt that is pushed over code', () => {
  setGate(machine, 0x40, handlerOf(machine, 0x40), { ist: 1 });
  // The frame ends 16 bytes into the code: it is RSP that comes to lie over the MOV.
  const top = Buffer.alloc(8);
  top.writeBigUInt64LE(TARGET + 16n);
  machine.writePhysical(interruptStackSlot(machine, 0), top);
  expect(callAll()).toEqual(everywhere(OLD));
  machine.setRegisters(0, { rip: CODE, rflags: 0x202n });
  machine.writePhysical(CODE, hexBytes('90f4'));
  machine.raiseInterrupt(0, 0x40);
  machine.step(0, 1);
  expect(machine.readPhysical(TARGET, 8).readBigUInt64LE()).toBe(kernelStackOf(machine, 0));
  machine.setRegisters(1, { rip: TARGET, rax: 7n });
  machine.step(1, 1);
  expect(machine.registers(1).rax).not.toBe(OLD);
});

describe('self-modifying code', () => {
  for (const mode of MODES) {
    it(`the next instruction is the new one (${mode})`, () => {
      // mov byte ptr [rip+1], 0x55; mov al, 0
      execute(0, mode, 'c6050100000055 b000', {});
      expect(machine.registers(0).rax & 0xffn).toBe(0x55n);
    });

    it(`a loop that counts in its own immediate (${mode})`, () => {
      // loop: inc dword ptr [rip+1]; mov eax, 0; dec ecx; jnz loop
      execute(0, mode, 'ff0501000000 b800000000 ffc9 75f1', { rcx: 20n });
      expect(machine.registers(0)).toMatchObject({ rax: 20n, rcx: 0n });
    });

    it(`an instruction that overwrites itself has done what it was (${mode})`, () => {
      // mov dword ptr [rip-10], nops; the loop back executes those
      execute(0, mode, '90 c705f6ffffff90909090', {});
      expect(machine.readPhysical(CODE + 1n, 4)).toEqual(hexBytes('90909090'));
      expect(machine.registers(0).rip).toBe(CODE + 12n);
    });
  }

  it('in an execute-only page', () => {
    setAccess(machine, CODE, 1, ACCESS_EXECUTE);
    execute(0, 'free running', 'ff0501000000 b800000000 ffc9 75f1', { rcx: 20n });
    expect(machine.registers(0)).toMatchObject({ rax: 20n, rcx: 0n });
  });
});

it('an instruction whose second half, on the next page, changes', () => {
  const at = TARGET + 0xffdn;
  machine.writePhysical(at, hexBytes('b801010101f4'));
  for (const mode of MODES) expect(call(1, mode, at)).toBe(OLD);
  execute(0, 'free running', 'c60302', { rbx: TARGET + 0x1001n });
  for (const mode of MODES) expect(call(1, mode, at)).toBe(0x02010101n);
  machine.writePhysical(TARGET + 0x1000n, hexBytes('0303'));
  for (const mode of MODES) expect(call(1, mode, at)).toBe(0x03030101n);
});

it('one vCPU patches while the other executes, many times and free running', () => {
  // patcher: inc dword ptr [rbx]; dec ecx; jnz patcher; hlt
  machine.writePhysical(CODE, hexBytes('ff03 ffc9 75fa f4'));
  // runner: mov eax, imm32; cmp eax, edx; jb wrong; mov edx, eax; cmp eax, esi; jb runner; hlt; wrong: ud2
  machine.writePhysical(TARGET, hexBytes('b800000000 39d0 7207 89c2 39f0 72f1 f4 0f0b'));
  const rounds = 20_000n;
  machine.setRegisters(0, { rip: CODE, rbx: VALUE, rcx: rounds });
  machine.setRegisters(1, { rip: TARGET, rdx: 0n, rsi: rounds });
  while (!machine.run(10_000).idle);
  expect(machine.registers(1)).toMatchObject({ rax: rounds, rdx: rounds, rip: TARGET + 16n });
});

it('other code at the same address, by a change of the page tables', () => {
  const far = 0x40_0000n;
  machine.writePhysical(far + TARGET, hexBytes('b802020202f4'));
  expect(callAll()).toEqual(everywhere(OLD));
  machine.writePhysical(
    pageDirectoryEntry(machine, 0n),
    machine.readPhysical(pageDirectoryEntry(machine, far), 8),
  );
  // The guest says so: mov rax, cr3; mov cr3, rax, at an address that has not moved
  machine.writePhysical(far + CODE, hexBytes('0f20d80f22d8f4'));
  for (const vcpu of [0, 1]) {
    machine.setRegisters(vcpu, { rip: far + CODE });
    machine.step(vcpu, 3);
  }
  expect(callAll()).toEqual(everywhere(NEW));
});

it('bytes that one completion executed from elsewhere are not what runs next', () => {
  const load = CODE + 0x10n;
  // mov rax, [rbx]; hlt
  machine.writePhysical(load, hexBytes('488b03f4'));
  setAccess(machine, SCRATCH, 1, ACCESS_WRITE);
  for (const mode of MODES) {
    machine.setRegisters(0, { rip: load, rbx: SCRATCH });
    const trap = mode === 'stepped' ? machine.step(0, 1).trap : machine.run(10_000).traps[0];
    expect(trap).toMatchObject({ access: 'read' });
    // inc eax; nop
    machine.writePhysical(load, hexBytes('ffc090'));
    machine.complete(0);
    machine.setRegisters(0, { rip: load, rax: 5n });
    if (mode === 'stepped') machine.step(0, 3);
    else runAlone(0);
    expect(machine.registers(0)).toMatchObject({ rax: 6n, rip: load + 4n });
    machine.writePhysical(load, hexBytes('488b03f4'));
  }
});

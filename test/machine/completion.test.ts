// A trapped instruction is decoded at the trap; completing it carries out what was decoded, on real or on
// substituted data, whatever has become of its bytes.
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  ACCESS_EXECUTE,
  ACCESS_READ,
  ACCESS_WRITE,
  type Machine,
  type Trap,
} from '../../src/machine/machine.js';
import type { Registers } from '../../src/x86/registers.js';
import {
  CODE,
  createFlatMachine,
  DATA,
  handlerOf,
  hexBytes,
  KERNEL_BASE,
  pageDirectoryEntry,
  runCode,
  SCRATCH,
  setAccess,
} from './support.js';

const NEXT = DATA + 0x1000n;
const UNMAPPED = 0x8000_0000n;
const REAL = 0x1111_1111_1111_1111n;
const ALL = 7;

let machine: Machine;
beforeEach(() => {
  machine = createFlatMachine({ vcpus: 2 });
  machine.writePhysical(DATA, Buffer.alloc(0x2000, 0x11));
  setAccess(machine, DATA, 2, ACCESS_EXECUTE);
});
afterEach(() => machine.close());

/** Runs one vCPU to its next trap. */
function trapAt(code: string, registers: Partial<Registers>, at = CODE): Trap {
  machine.writePhysical(at, hexBytes(code));
  machine.setRegisters(0, { rip: at, ...registers });
  return nextTrap();
}

function nextTrap(): Trap {
  const { trap } = machine.step(0, 100);
  if (trap === undefined) throw new Error('nothing trapped');
  return trap;
}

const ascending = (length: number, from = 0x81) => Buffer.from(Array.from({ length }, (_, i) => from + i));
const asNumber = (bytes: Uint8Array) => BigInt(`0x${Buffer.from(bytes).reverse().toString('hex')}`);

describe('completed as decoded, though its bytes were replaced while it was trapped', () => {
  // mov rax, [rbx+8]
  const LOAD = '488b4308';
  const END = CODE + 4n;

  it.each([
    ['by a jump', 'e9fb000000'],
    ['by a shorter instruction', '90'],
    ['by a longer instruction', '48b88877665544332211'],
    ['by a breakpoint', 'cc'],
    ['by what does not decode', '0606060606'],
    ['by a halt', 'f4f4f4f4'],
    ['in its last byte only, the displacement', '488b4310'],
    ['by a store to the same address', '48894308'],
  ])('%s', (_, replacement) => {
    const before = trapAt(LOAD, { rbx: DATA, rcx: 3n });
    expect(before).toMatchObject({ gva: DATA + 8n, length: 8 });
    machine.writePhysical(CODE, hexBytes(replacement));
    machine.complete(0);
    expect(machine.registers(0)).toMatchObject({ rip: END, rax: REAL, rcx: 3n });
    expect(machine.readPhysical(DATA, 32)).toEqual(Buffer.alloc(32, 0x11));
    // And memory is left with the new bytes.
    expect(machine.readPhysical(CODE, replacement.length / 2)).toEqual(hexBytes(replacement));
  });

  it('with substituted data, too', () => {
    trapAt(LOAD, { rbx: DATA });
    machine.writePhysical(CODE, hexBytes('e9fb000000'));
    machine.complete(0, ascending(8));
    expect(machine.registers(0)).toMatchObject({ rip: END, rax: asNumber(ascending(8)) });
  });

  it('free running, and the vCPU then executes what is there', () => {
    machine.writePhysical(CODE, hexBytes(`${LOAD}f4`));
    machine.setRegisters(0, { rip: CODE, rbx: DATA });
    expect(machine.run(10_000).traps).toHaveLength(1);
    // jmp CODE; behind it: inc ecx; hlt
    machine.writePhysical(CODE, hexBytes('ebfe9090 ffc1 f4'));
    machine.complete(0);
    machine.setRegisters(0, { rcx: 0n });
    while (!machine.run(10_000).idle);
    expect(machine.registers(0)).toMatchObject({ rip: END + 3n, rax: REAL, rcx: 1n });
  });

  it('across the end of a page, whichever page is changed', () => {
    for (const [first, second] of [
      ['ebfe', '9090'],
      ['488b', '9090'],
      ['ebfe', '4308'],
    ]) {
      const at = SCRATCH + 0xffen;
      trapAt(LOAD, { rbx: DATA, rax: 0n }, at);
      machine.writePhysical(at, hexBytes(first! + second!));
      machine.complete(0);
      expect(machine.registers(0)).toMatchObject({ rip: at + 4n, rax: REAL });
    }
  });

  it('though the page tables lead elsewhere by then', () => {
    trapAt(LOAD, { rbx: KERNEL_BASE + DATA }, CODE);
    const entry = pageDirectoryEntry(machine, CODE);
    const before = machine.readPhysical(entry, 8);
    machine.writePhysical(entry, machine.readPhysical(pageDirectoryEntry(machine, 0x40_0000n), 8));
    machine.complete(0, ascending(8));
    machine.writePhysical(entry, before);
    expect(machine.registers(0)).toMatchObject({ rip: END, rax: asNumber(ascending(8)) });
  });

  it('though its page may no longer be executed', () => {
    trapAt(LOAD, { rbx: DATA });
    setAccess(machine, CODE, 1, ACCESS_READ | ACCESS_WRITE);
    machine.complete(0);
    expect(machine.step(0, 0).trap).toBeUndefined();
    expect(machine.registers(0)).toMatchObject({ rip: END, rax: REAL });
    expect(machine.step(0, 1).trap).toMatchObject({ access: 'execute', rip: END });
  });

  it('by the other vCPU, which already executes the new bytes', () => {
    trapAt(LOAD, { rbx: DATA });
    // mov dword ptr [rbx], 'inc eax; hlt'; jmp rbx
    machine.writePhysical(SCRATCH, hexBytes('c703ffc0f4f4 ffe3'));
    machine.setRegisters(1, { rip: SCRATCH, rbx: CODE, rax: 0n });
    machine.step(1, 4);
    expect(machine.registers(1)).toMatchObject({ rip: CODE + 3n, rax: 1n });
    machine.complete(0);
    expect(machine.registers(0)).toMatchObject({ rip: END, rax: REAL });
    machine.setRegisters(0, { rip: CODE, rax: 0n });
    machine.step(0, 2);
    expect(machine.registers(0)).toMatchObject({ rip: CODE + 3n, rax: 1n });
  });

  it('a store, a call and a push', () => {
    trapAt('488903', { rbx: DATA, rax: 0x77n });
    machine.writePhysical(CODE, hexBytes('9090cc'));
    machine.complete(0);
    expect(machine.readPhysical(DATA, 8)).toEqual(hexBytes('7700000000000000'));
    expect(machine.registers(0).rip).toBe(CODE + 3n);

    trapAt('e8fb000000', { rsp: DATA + 0x20n });
    machine.writePhysical(CODE, hexBytes('cccccccccc'));
    machine.complete(0);
    expect(machine.registers(0)).toMatchObject({ rip: CODE + 0x100n, rsp: DATA + 0x18n });
    expect(machine.readPhysical(DATA + 0x18n, 8).readBigUInt64LE()).toBe(CODE + 5n);

    trapAt('6a05', { rsp: DATA + 0x20n });
    machine.writePhysical(CODE, hexBytes('6a06'));
    machine.complete(0);
    expect(machine.readPhysical(DATA + 0x18n, 8).readBigUInt64LE()).toBe(5n);
  });

  it('in all its pieces, when it is replaced between two of them', () => {
    trapAt('488b03', { rbx: NEXT - 4n });
    machine.complete(0, hexBytes('01020304'));
    machine.writePhysical(CODE, hexBytes('ebfe90'));
    expect(nextTrap()).toMatchObject({ gva: NEXT, length: 4, rip: CODE });
    machine.complete(0, hexBytes('05060708'));
    expect(machine.registers(0)).toMatchObject({ rip: CODE + 3n, rax: 0x0807060504030201n });
  });
});

describe('substituted data', () => {
  it.each([
    ['mov al, [rbx]', '8a03', 1],
    ['mov ah, [rbx]', '8a23', 1],
    ['mov ax, [rbx]', '668b03', 2],
    ['mov eax, [rbx]', '8b03', 4],
    ['mov rax, [rbx]', '488b03', 8],
    ['movzx eax, byte ptr [rbx]', '0fb603', 1],
    ['movsx rax, byte ptr [rbx]', '480fbe03', 1],
    ['movsx eax, word ptr [rbx]', '0fbf03', 2],
    ['movsxd rax, dword ptr [rbx]', '486303', 4],
    ['movbe rax, [rbx]', '480f38f003', 8],
    ['movups xmm0, [rbx]', '0f1003', 16],
    ['movaps xmm0, [rbx]', '0f2803', 16],
    ['movq xmm0, [rbx]', 'f30f7e03', 8],
    ['fld tbyte ptr [rbx]', 'db2b', 10],
    ['fld qword ptr [rbx]', 'dd03', 8],
    ['pop rax', '58', 8],
    ['add rax, [rbx]', '480303', 8],
    ['cmp [rbx], ecx', '390b', 4],
    ['xlatb', 'd7', 1],
    ['lodsw', '66ad', 2],
    ['scasd', 'af', 4],
    ['fxrstor64 [rbx]', '480fae0b', 512],
  ])('for %s has the effect of that data in memory, which stays', (_, code, length) => {
    const data = code === '480fae0b' ? Buffer.alloc(512, 0) : ascending(length);
    const registers = { rax: 0n, rbx: DATA, rcx: 0x84838281n, rsi: DATA, rdi: DATA, rsp: DATA, rflags: 2n };
    // movups [r14], xmm0; fnsave [r14+16], to compare what is in no general register
    const store = hexBytes('410f1106 41dd7610');
    const run = (onTrap: (trap: Trap) => Uint8Array | undefined) => {
      machine.writePhysical(SCRATCH, Buffer.alloc(0x200));
      // xorps xmm0, xmm0; fninit
      const whole = Buffer.concat([hexBytes('0f57c0 dbe3'), hexBytes(code), store]);
      const { registers: after, traps } = runCode(
        machine,
        CODE,
        whole,
        { ...registers, r14: SCRATCH },
        { onTrap },
      );
      return { after, traps, scratch: machine.readPhysical(SCRATCH, 0x200) };
    };
    const substituted = run(() => data);
    expect(substituted.traps).toMatchObject([{ gva: DATA, length, access: 'read' }]);
    expect(machine.readPhysical(DATA, 0x2000)).toEqual(Buffer.alloc(0x2000, 0x11));
    const real = run(() => undefined);
    machine.writePhysical(DATA, data);
    const expected = run(() => undefined);
    expect(substituted.after).toEqual(expected.after);
    expect(substituted.scratch).toEqual(expected.scratch);
    // It does make a difference.
    if (code !== '480fae0b')
      expect([substituted.after, substituted.scratch]).not.toEqual([real.after, real.scratch]);
  });

  it('that does not cover the piece is ignored', () => {
    trapAt('488b03', { rbx: DATA });
    machine.complete(0, ascending(7));
    expect(machine.registers(0)).toMatchObject({ rip: CODE + 3n, rax: REAL });
  });

  it('beyond the piece is ignored: it does not reach what else the instruction reads', () => {
    // cmpsq, both operands on one page, the second inside the surplus
    trapAt('48a7', { rsi: DATA, rdi: DATA + 16n });
    machine.complete(0, Buffer.alloc(64, 0x22));
    expect(nextTrap()).toMatchObject({ gva: DATA + 16n, access: 'read' });
    machine.complete(0);
    const { rflags } = machine.registers(0);
    // 0x22… compared with 0x11…: above, and not equal
    expect(rflags & 0x41n).toBe(0n);
  });

  it('for a write or an execution is ignored', () => {
    trapAt('488903', { rbx: DATA, rax: 0x99n });
    machine.complete(0, ascending(8));
    expect(machine.readPhysical(DATA, 8).readBigUInt64LE()).toBe(0x99n);
    setAccess(machine, CODE, 1, ACCESS_READ | ACCESS_WRITE);
    expect(trapAt('b805000000', {})).toMatchObject({ access: 'execute', length: 5 });
    machine.complete(0, hexBytes('b806000000'));
    expect(machine.registers(0).rax).toBe(5n);
  });

  it('is for that one execution: the same instruction later reads what is there', () => {
    machine.writePhysical(CODE, hexBytes('488b03 488b0b f4'));
    machine.setRegisters(0, { rip: CODE, rbx: DATA });
    nextTrap();
    machine.complete(0, ascending(8));
    setAccess(machine, DATA, 1, ALL);
    machine.step(0, 1);
    expect(machine.registers(0)).toMatchObject({ rax: asNumber(ascending(8)), rcx: REAL });
  });

  it('counts though the permission was given back while the trap was open', () => {
    trapAt('488b03', { rbx: DATA });
    setAccess(machine, DATA, 1, ALL);
    machine.complete(0, ascending(8));
    expect(machine.registers(0).rax).toBe(asNumber(ascending(8)));
  });

  it('reaches the vCPU that trapped and no other', () => {
    for (const vcpu of [0, 1]) {
      machine.writePhysical(CODE, hexBytes('488b03f4'));
      machine.setRegisters(vcpu, { rip: CODE, rbx: DATA });
      expect(machine.step(vcpu, 1).trap).toMatchObject({ vcpu });
    }
    machine.complete(0, ascending(8));
    machine.complete(1, ascending(8, 0x41));
    expect(machine.registers(0).rax).toBe(asNumber(ascending(8)));
    expect(machine.registers(1).rax).toBe(asNumber(ascending(8, 0x41)));
  });

  describe('of a read that crosses pages', () => {
    const cross = (first: Uint8Array | undefined, second: Uint8Array | undefined) => {
      expect(trapAt('488b03', { rbx: NEXT - 3n })).toMatchObject({ gva: NEXT - 3n, length: 3 });
      machine.complete(0, first);
      expect(nextTrap()).toMatchObject({ gva: NEXT, length: 5, rip: CODE });
      machine.complete(0, second);
      expect(machine.registers(0).rip).toBe(CODE + 3n);
      return machine.registers(0).rax;
    };

    it('comes in two answers', () => {
      expect(cross(ascending(3), ascending(5, 0x84))).toBe(asNumber(ascending(8)));
    });

    it('may be for one page only, the other shows its own', () => {
      expect(cross(ascending(3), undefined)).toBe(0x1111111111838281n);
      expect(cross(undefined, ascending(5))).toBe(0x8584838281111111n);
    });

    it('and an answer of the whole operand to the first piece is not taken for the second', () => {
      expect(cross(ascending(8), undefined)).toBe(0x1111111111838281n);
    });

    it('is there although only the second page traps', () => {
      setAccess(machine, DATA, 1, ALL);
      expect(trapAt('488b03', { rbx: NEXT - 3n })).toMatchObject({ gva: NEXT, length: 5 });
      machine.complete(0, ascending(5));
      expect(machine.registers(0).rax).toBe(0x8584838281111111n);
    });
  });
});

describe('instructions with several accesses', () => {
  it('rep movs goes element by element, each with its own data', () => {
    setAccess(machine, NEXT, 1, ALL);
    machine.writePhysical(CODE, hexBytes('f348a5 f4'));
    machine.setRegisters(0, { rip: CODE, rsi: DATA, rdi: NEXT, rcx: 3n });
    for (let element = 0; element < 3; element++) {
      expect(nextTrap()).toMatchObject({
        access: 'read',
        gva: DATA + BigInt(element * 8),
        length: 8,
        rip: CODE,
      });
      expect(machine.registers(0).rcx).toBe(BigInt(3 - element));
      machine.complete(0, ascending(8, 0x40 + element));
    }
    expect(machine.registers(0)).toMatchObject({ rcx: 0n, rsi: DATA + 24n, rdi: NEXT + 24n });
    const expected = Buffer.concat([0x40, 0x41, 0x42].map((from) => ascending(8, from)));
    expect(machine.readPhysical(NEXT, 24)).toEqual(expected);
  });

  it('rep movs whose bytes are replaced in the middle has done the element under way, no more', () => {
    setAccess(machine, NEXT, 1, ALL);
    machine.writePhysical(CODE, hexBytes('f3a4 f4'));
    machine.setRegisters(0, { rip: CODE, rsi: DATA, rdi: NEXT, rcx: 3n });
    nextTrap();
    machine.writePhysical(CODE, hexBytes('eb00'));
    machine.complete(0, hexBytes('77'));
    expect(machine.registers(0)).toMatchObject({ rcx: 2n, rip: CODE });
    machine.step(0, 2);
    expect(machine.registers(0)).toMatchObject({ rcx: 2n, rip: CODE + 3n });
    expect(machine.readPhysical(NEXT, 2)).toEqual(hexBytes('7711'));
  });

  it.each([
    ['on one page', DATA + 0x100n],
    ['on two pages', NEXT + 0x100n],
  ])('cmps reads twice, %s, and each answer is for its own operand', (_, other) => {
    for (const [first, second, equal] of [
      [0x55, 0x55, true],
      [0x55, 0x66, false],
    ] as const) {
      const traps = [trapAt('a6', { rsi: DATA, rdi: other })];
      const answer = ({ gva }: Trap) => machine.complete(0, Buffer.of(gva === DATA ? first : second));
      answer(traps[0]!);
      traps.push(nextTrap());
      answer(traps[1]!);
      // Which one is read first is the CPU's business.
      expect(traps.map(({ gva }) => gva).toSorted()).toEqual([DATA, other]);
      expect((machine.registers(0).rflags & 0x40n) !== 0n).toBe(equal);
    }
  });

  it.each([
    ['add [rbx], eax', '0103', 0x84838282n],
    ['lock xadd [rbx], eax', 'f00fc103', 0x84838282n],
    ['not dword ptr [rbx]', 'f713', 0x7b7c7d7en],
    ['bts dword ptr [rbx], 1', '0fba2b01', 0x84838283n],
  ])('%s works on the substituted value and then writes the result', (_, code, result) => {
    const trap = trapAt(code, { rbx: DATA, rax: 1n });
    expect(trap).toMatchObject({ access: 'read', length: 4 });
    machine.complete(0, ascending(4));
    expect(machine.readPhysical(DATA, 4)).toEqual(Buffer.alloc(4, 0x11));
    expect(nextTrap()).toMatchObject({ access: 'write', length: 4 });
    machine.complete(0);
    expect(machine.readPhysical(DATA, 8).readUInt32LE()).toBe(Number(result));
    // Its neighbours are what they were.
    expect(machine.readPhysical(DATA + 4n, 4)).toEqual(Buffer.alloc(4, 0x11));
  });

  it('a further piece is delivered to a paused vCPU too, by step(vcpu, 0)', () => {
    trapAt('488b03', { rbx: NEXT - 4n });
    machine.pause(0);
    machine.complete(0);
    expect(machine.step(0, 0).trap).toMatchObject({ gva: NEXT });
    machine.complete(0);
    expect(machine.registers(0)).toMatchObject({ rip: CODE + 3n, rax: REAL });
    expect(machine.step(0, 5)).toEqual({ retired: 0 });
  });

  it('a further piece is delivered by run before anything else runs', () => {
    trapAt('488b03', { rbx: NEXT - 4n });
    machine.complete(0);
    machine.writePhysical(SCRATCH, hexBytes('ebfe'));
    machine.setRegisters(1, { rip: SCRATCH });
    expect(machine.run(10_000).traps).toMatchObject([{ vcpu: 0, gva: NEXT }]);
    expect(machine.registers(1).rip).toBe(SCRATCH);
  });
});

describe('what the instruction meets when it is completed', () => {
  it('the memory of that moment, not of the trap', () => {
    trapAt('488b03', { rbx: DATA });
    machine.writePhysical(DATA, ascending(8));
    machine.complete(0);
    expect(machine.registers(0).rax).toBe(asNumber(ascending(8)));
  });

  it('a division by the substituted zero is the guest’s #DE, with RIP at the instruction', () => {
    trapAt('f733', { rbx: DATA, rax: 5n, rdx: 0n });
    machine.complete(0, Buffer.alloc(4));
    const { rip, rsp } = machine.registers(0);
    expect(rip).toBe(handlerOf(machine, 0));
    expect(machine.readPhysical(rsp - KERNEL_BASE, 8).readBigUInt64LE()).toBe(CODE);
  });

  it('a page fault of its other operand is the guest’s #PF, and it has done nothing', () => {
    // movsb, the target unmapped
    trapAt('a4', { rsi: DATA, rdi: UNMAPPED });
    machine.complete(0, hexBytes('22'));
    const { rip, rsp, cr2, rsi } = machine.registers(0);
    expect({ rip, cr2, rsi }).toEqual({ rip: handlerOf(machine, 14), cr2: UNMAPPED, rsi: DATA });
    expect(machine.readPhysical(rsp - KERNEL_BASE, 16).readBigUInt64LE(8)).toBe(CODE);
    // Handled, it traps again.
    machine.setRegisters(0, { rip: CODE, rdi: SCRATCH });
    expect(nextTrap()).toMatchObject({ access: 'read', gva: DATA });
    machine.complete(0, hexBytes('22'));
    expect(machine.readPhysical(SCRATCH, 1)).toEqual(hexBytes('22'));
  });

  it('an interrupt that became pending waits until the instruction has retired', () => {
    trapAt('488b03', { rbx: DATA, rflags: 0x202n });
    machine.raiseInterrupt(0, 0x40);
    expect(machine.step(0, 1)).toEqual({ retired: 0 });
    machine.complete(0, ascending(8));
    expect(machine.registers(0)).toMatchObject({ rip: CODE + 3n, rax: asNumber(ascending(8)) });
    machine.step(0, 1);
    const { rip, rsp } = machine.registers(0);
    expect(rip).toBe(handlerOf(machine, 0x40) + 1n);
    expect(machine.readPhysical(rsp - KERNEL_BASE, 8).readBigUInt64LE()).toBe(CODE + 3n);
  });
});

describe('retry', () => {
  it('decodes afresh what is there now', () => {
    trapAt('488b03', { rbx: DATA, rcx: 0n });
    machine.writePhysical(CODE, hexBytes('ffc1f4'));
    machine.retry(0);
    machine.step(0, 2);
    expect(machine.registers(0)).toMatchObject({ rcx: 1n, rip: CODE + 3n });
  });

  it('traps again as long as the permission denies it, and not after', () => {
    trapAt('488b03', { rbx: DATA });
    machine.retry(0);
    expect(nextTrap()).toMatchObject({ rip: CODE, gva: DATA });
    setAccess(machine, DATA, 1, ALL);
    machine.retry(0);
    expect(machine.step(0, 1)).toEqual({ retired: 1 });
    expect(machine.registers(0).rax).toBe(REAL);
  });

  it('forgets the answers given to earlier pieces', () => {
    trapAt('488b03', { rbx: NEXT - 4n });
    machine.complete(0, ascending(4));
    nextTrap();
    machine.retry(0);
    setAccess(machine, DATA, 2, ALL);
    machine.step(0, 1);
    expect(machine.registers(0).rax).toBe(REAL);
  });
});

import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE, type Machine } from '../../src/machine/machine.js';
import {
  CODE,
  createFlatMachine,
  DATA,
  hexBytes,
  KERNEL_BASE,
  pageDirectoryEntry,
  runCode,
  setAccess,
} from './support.js';

const ALL = ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE;
const NEXT = DATA + 0x1000n;

/** mov rax, [rbx] */
const LOAD = hexBytes('488b03');
/** mov [rbx], rax */
const STORE = hexBytes('488903');
/** call rbx, to code that returns */
const CALL = hexBytes('ffd3');

let machine: Machine;
beforeEach(() => {
  machine = createFlatMachine({ vcpus: 2 });
});
afterEach(() => machine.close());

/** What trapped, as `access gva+length`. */
function trapsOf(code: Uint8Array, registers: Parameters<typeof runCode>[3], at = CODE): string[] {
  return runCode(machine, at, code, registers).traps.map(
    ({ access, gva, length }) => `${access} ${gva.toString(16)}+${length}`,
  );
}

describe('a permission', () => {
  const RET = 0xc3;
  it.each([
    ['nothing', 0, ['read', 'write', 'execute']],
    ['reads', ACCESS_READ, ['write', 'execute']],
    ['writes', ACCESS_WRITE, ['read', 'execute']],
    ['execution', ACCESS_EXECUTE, ['read', 'write']],
    ['reads and writes', ACCESS_READ | ACCESS_WRITE, ['execute']],
    ['reads and execution', ACCESS_READ | ACCESS_EXECUTE, ['write']],
    ['writes and execution', ACCESS_WRITE | ACCESS_EXECUTE, ['read']],
    ['everything', ALL, []],
  ])('of %s traps the rest, and only that', (_, access, expected) => {
    machine.writePhysical(DATA, Buffer.of(RET));
    setAccess(machine, DATA, 1, access);
    expect(machine.access(DATA >> 12n)).toBe(access);
    // Twice: what let one access in must not let in another.
    const seen = [LOAD, STORE, CALL, LOAD, STORE, CALL].flatMap((code) => {
      const { traps } = runCode(machine, CODE, code, { rbx: DATA, rax: 0xc3n });
      return traps.map((trap) => trap.access);
    });
    expect(seen).toEqual([...expected, ...expected]);
  });

  it('holds for the frame, whatever address leads to it', () => {
    setAccess(machine, DATA, 1, ACCESS_EXECUTE);
    const { traps } = runCode(machine, CODE, LOAD, { rbx: KERNEL_BASE + DATA + 8n });
    expect(traps).toMatchObject([{ gva: KERNEL_BASE + DATA + 8n, gpa: DATA + 8n, access: 'read' }]);
  });

  it('holds for every vCPU, and at once, though each has used the frame before', () => {
    for (const vcpu of [0, 1]) {
      expect(runCode(machine, CODE, LOAD, { rbx: DATA }, { vcpu }).traps).toEqual([]);
    }
    setAccess(machine, DATA, 1, ACCESS_EXECUTE);
    for (const vcpu of [0, 1]) {
      expect(runCode(machine, CODE, LOAD, { rbx: DATA }, { vcpu }).traps).toMatchObject([{ vcpu }]);
    }
    setAccess(machine, DATA, 1, ALL);
    for (const vcpu of [0, 1]) {
      expect(runCode(machine, CODE, LOAD, { rbx: DATA }, { vcpu }).traps).toEqual([]);
    }
  });

  it.each(['step', 'run'])(
    'holds from the next access of a loop on that is in full swing, and no longer (%s)',
    (mode) => {
      // loop: mov rax, [rbx]; mov [rbx], rax; jmp loop
      machine.writePhysical(CODE, hexBytes('488b03 488903 ebf8'));
      machine.setRegisters(0, { rip: CODE, rbx: DATA });
      const next = () => (mode === 'step' ? machine.step(0, 1000).trap : machine.run(500).traps[0]);
      for (const [denied, access] of [
        [ACCESS_READ, 'read'],
        [ACCESS_WRITE, 'write'],
        [ACCESS_EXECUTE, 'execute'],
      ] as const) {
        expect(next()).toBeUndefined();
        setAccess(machine, denied === ACCESS_EXECUTE ? CODE : DATA, 1, ALL & ~denied);
        expect(next()).toMatchObject({ access });
        setAccess(machine, denied === ACCESS_EXECUTE ? CODE : DATA, 1, ALL);
        machine.complete(0);
      }
      expect(next()).toBeUndefined();
    },
  );

  it('does not concern the host, nor the CPU that reads page tables and pushes interrupt frames', () => {
    setAccess(machine, 0n, machine.memoryBytes >> 12, ACCESS_EXECUTE);
    machine.writePhysical(DATA, hexBytes('0102'));
    expect(machine.readPhysical(DATA, 2).toString('hex')).toBe('0102');
    machine.raiseInterrupt(0, 0x40);
    const { traps } = runCode(machine, CODE, hexBytes('fb90'));
    expect(traps).toEqual([]);
  });
});

describe('an execute-only page', () => {
  it('runs code that reads and writes its own page: only the data accesses trap', () => {
    // mov eax, [rip-6]; inc eax; mov [rip+0x40], eax; nop
    const code = hexBytes('8b05faffffff ffc0 890540000000 90');
    setAccess(machine, CODE, 1, ACCESS_EXECUTE);
    expect(trapsOf(code, {})).toEqual(['read 10000+4', 'write 1004e+4']);
    expect(machine.registers(0).rax).toBe(0xfffa058bn + 1n);
    expect(machine.readPhysical(CODE + 0x4en, 4)).toEqual(hexBytes('8c05faff'));
  });

  it('traps each pass of a loop in it, free running too', () => {
    // loop: mov eax, [rip-6]; dec ecx; jnz loop; hlt
    machine.writePhysical(CODE, hexBytes('8b05faffffff ffc9 75f6 f4'));
    setAccess(machine, CODE, 1, ACCESS_EXECUTE);
    machine.setRegisters(0, { rip: CODE, rcx: 10n });
    let seen = 0;
    for (let run = machine.run(10_000); !run.idle; run = machine.run(10_000)) {
      for (const trap of run.traps) {
        seen++;
        expect(machine.registers(0).rcx).toBe(BigInt(11 - seen));
        machine.complete(trap.vcpu);
      }
    }
    expect(seen).toBe(10);
  });
});

describe('an access that crosses pages', () => {
  it.each([
    ['mov rax, [rbx]', '488b03', 3n, ['read 20ffd+3', 'read 21000+5']],
    ['mov [rbx], eax', '8903', 1n, ['write 20fff+1', 'write 21000+3']],
    ['movups xmm0, [rbx]', '0f1003', 15n, ['read 20ff1+15', 'read 21000+1']],
    ['fstp tbyte ptr [rbx]', 'db3b', 2n, ['write 20ffe+2', 'write 21000+8']],
    ['add [rbx], rax', '480103', 4n, ['read 20ffc+4', 'read 21000+4', 'write 21000+4', 'write 20ffc+4']],
    [
      'lock inc word ptr [rbx]',
      'f066ff03',
      1n,
      ['read 20fff+1', 'read 21000+1', 'write 21000+1', 'write 20fff+1'],
    ],
    ['push rax', '50', 4n, ['write 20ffc+4', 'write 21000+4']],
    ['pop rax', '58', 4n, ['read 20ffc+4', 'read 21000+4']],
    ['fxsave64 [rbx]', '480fae03', 16n, ['write 20ff0+16', 'write 21000+496']],
    ['movsq', '48a5', 5n, ['read 20ffb+5', 'read 21000+3', 'write 22000+8']],
  ])('%s traps once for each page’s piece', (_, code, before, expected) => {
    const start = NEXT - before;
    const registers = {
      rax: 0x1122334455667788n,
      rbx: start,
      rsi: start,
      rdi: DATA + 0x2000n,
      rsp: code === '50' ? start + 8n : start,
    };
    const prepare = () =>
      machine.writePhysical(DATA, Buffer.from(Array.from({ length: 0x3000 }, (_, i) => (i * 7) & 0xff)));
    prepare();
    runCode(machine, CODE, hexBytes(code), registers);
    const plain = [machine.registers(0), machine.readPhysical(DATA, 0x3000)];
    prepare();
    setAccess(machine, DATA, 3, ACCESS_EXECUTE);
    const seen = trapsOf(hexBytes(code), registers);
    expect(seen.toSorted()).toEqual(expected.toSorted());
    expect([machine.registers(0), machine.readPhysical(DATA, 0x3000)]).toEqual(plain);
  });

  it('traps on the second page alone, before the first has changed', () => {
    setAccess(machine, NEXT, 1, ACCESS_EXECUTE);
    machine.writePhysical(CODE, hexBytes('488903f4'));
    machine.setRegisters(0, { rip: CODE, rbx: NEXT - 4n, rax: 0xffff_ffff_ffff_ffffn });
    const { trap } = machine.step(0, 1);
    expect(trap).toMatchObject({ access: 'write', gva: NEXT, gpa: NEXT, length: 4 });
    expect(machine.readPhysical(NEXT - 4n, 8)).toEqual(Buffer.alloc(8));
    machine.complete(0);
    expect(machine.readPhysical(NEXT - 4n, 8)).toEqual(Buffer.alloc(8, 0xff));
  });

  it('has the GPA of each piece where neighbouring pages are not neighbouring frames', () => {
    // The page directory's entries map 2 MB each; the third is made to map what the first does.
    const boundary = 0x40_0000n;
    const entry = machine.readPhysical(pageDirectoryEntry(machine, 0n), 8);
    machine.writePhysical(pageDirectoryEntry(machine, boundary), entry);
    setAccess(machine, boundary - 0x1000n, 1, ACCESS_EXECUTE);
    setAccess(machine, 0n, 1, ACCESS_EXECUTE);
    const { traps } = runCode(machine, CODE, LOAD, { rbx: boundary - 2n });
    expect(traps).toMatchObject([
      { gva: boundary - 2n, gpa: boundary - 2n, length: 2 },
      { gva: boundary, gpa: 0n, length: 6 },
    ]);
  });
});

describe('a page that may not be executed', () => {
  /** Twelve bytes before the end of the first of two pages of code. */
  const TAIL = DATA + 0xff4n;

  it('traps each instruction, each at its own address', () => {
    setAccess(machine, CODE, 1, ACCESS_READ | ACCESS_WRITE);
    // mov eax, 7; inc eax; hlt
    expect(trapsOf(hexBytes('b807000000 ffc0'), {})).toEqual([
      'execute 10000+5',
      'execute 10005+2',
      'execute 10007+1',
    ]);
    expect(machine.registers(0).rax).toBe(8n);
  });

  it('traps where straight code runs into it, not a moment earlier', () => {
    setAccess(machine, NEXT, 1, ACCESS_READ | ACCESS_WRITE);
    // 12 times inc eax, 2 bytes each: six on each page
    machine.writePhysical(TAIL, Buffer.concat([...Array(12).fill(hexBytes('ffc0')), hexBytes('f4')]));
    for (const mode of ['step', 'run']) {
      machine.setRegisters(0, { rip: TAIL, rax: 0n });
      const trap = mode === 'step' ? machine.step(0, 100).trap : machine.run(10_000).traps[0];
      expect(trap).toMatchObject({ access: 'execute', rip: NEXT, gva: NEXT, length: 2 });
      expect(machine.registers(0)).toMatchObject({ rip: NEXT, rax: 6n });
      machine.complete(0);
      expect(machine.registers(0)).toMatchObject({ rip: NEXT + 2n, rax: 7n });
    }
  });

  it.each(['step', 'run'])('traps for the piece of an instruction that crosses into it (%s)', (mode) => {
    setAccess(machine, NEXT, 1, ACCESS_READ | ACCESS_WRITE);
    // inc eax; mov ecx, imm32 with two bytes behind the page's end; hlt
    machine.writePhysical(NEXT - 5n, hexBytes('ffc0 b978563412 f4'));
    machine.setRegisters(0, { rip: NEXT - 5n, rax: 0n });
    const trap = mode === 'step' ? machine.step(0, 100).trap : machine.run(10_000).traps[0];
    expect(trap).toMatchObject({ access: 'execute', rip: NEXT - 3n, gva: NEXT, gpa: NEXT, length: 2 });
    expect(machine.registers(0).rax).toBe(1n);
    machine.complete(0);
    expect(machine.registers(0)).toMatchObject({ rip: NEXT + 2n, rcx: 0x12345678n });
  });

  it('traps a jump, a call and a return into it at the target', () => {
    setAccess(machine, DATA, 1, ACCESS_READ | ACCESS_WRITE);
    machine.writePhysical(DATA, hexBytes('f4'));
    const stack = machine.registers(0).rsp - 8n;
    machine.writePhysical(stack - KERNEL_BASE, hexBytes('0000020000000000'));
    for (const code of ['ffe3', 'ffd3', 'c3']) {
      machine.setRegisters(0, { rip: CODE, rbx: DATA, rsp: stack });
      machine.writePhysical(CODE, hexBytes(code));
      expect(machine.step(0, 100)).toMatchObject({ retired: 1, trap: { access: 'execute', rip: DATA } });
      machine.complete(0);
    }
  });
});

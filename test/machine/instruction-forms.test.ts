// Each way in which an instruction can touch memory: it traps before the access, at the exact address, with
// nothing changed yet; and completed it has done exactly what it does where nothing traps.
import { afterAll, describe, expect, it } from 'vitest';
import { ACCESS_EXECUTE, type Trap } from '../../src/machine/machine.js';
import { hex } from '../../src/vmi/address.js';
import type { Registers } from '../../src/x86/registers.js';
import { CODE, createFlatMachine, DATA, hexBytes, SCRATCH, SELECTORS, setAccess } from './support.js';

/** Disassembly, bytes, and the expected traps: `read`/`write`, offset in the data in hexadecimal, length. */
type Row = readonly [disassembly: string, code: string, traps: string, memory?: Memory];
/** Bytes that the instruction needs at an offset of the data. */
type Memory = { readonly at: number; readonly bytes: string };

const at = (offset: number, bytes: string): Memory => ({ at: offset, bytes });
/** Where the stack, RBP, RSI and RDI point to. */
const STACK = 0x800;
const FRAME = 0x300;

const FORMS: Record<string, readonly Row[]> = {
  'loads and stores': [
    ['mov rax, [rbx]', '488b03', 'read 100+8'],
    ['mov eax, [rbx]', '8b03', 'read 100+4'],
    ['mov ax, [rbx]', '668b03', 'read 100+2'],
    ['mov al, [rbx]', '8a03', 'read 100+1'],
    ['mov ah, [rbx]', '8a23', 'read 100+1'],
    ['mov r15, [r12+r13*8+0x10]', '4f8b7cec10', 'read 620+8'],
    ['mov [rbx], rax', '488903', 'write 100+8'],
    ['mov [rbx], eax', '8903', 'write 100+4'],
    ['mov [rbx], ax', '668903', 'write 100+2'],
    ['mov [rbx], ah', '8823', 'write 100+1'],
    ['mov qword ptr [rbx], -2', '48c703feffffff', 'write 100+8'],
    ['mov rax, [moffs]', '48a10001020000000000', 'read 100+8'],
    ['mov [moffs], al', 'a20001020000000000', 'write 100+1'],
    ['mov eax, [rip+0xfff0]', '8b05f0ff0000', 'read 03+4'],
    ['mov rax, fs:[rbx]', '64488b03', 'read 110+8'],
    ['mov rax, gs:[8]', '65488b042508000000', 'read 708+8'],
    ['mov eax, [ebx]', '678b03', 'read 100+4'],
    ['movzx eax, byte ptr [rbx]', '0fb603', 'read 100+1'],
    ['movzx eax, word ptr [rbx]', '0fb703', 'read 100+2'],
    ['movsx rax, byte ptr [rbx]', '480fbe03', 'read 100+1'],
    ['movsx eax, word ptr [rbx]', '0fbf03', 'read 100+2'],
    ['movsxd rax, dword ptr [rbx]', '486303', 'read 100+4'],
    ['movbe rax, [rbx]', '480f38f003', 'read 100+8'],
    ['movnti [rbx], rax', '480fc303', 'write 100+8'],
    ['cmovz rax, [rbx], condition true', '480f4403', 'read 100+8'],
    ['cmovnz rax, [rbx], condition false', '480f4503', 'read 100+8'],
    ['setz [rbx]', '0f9403', 'write 100+1'],
    ['xlatb', 'd7', 'read 118+1'],
    ['mov ds, [rbp]', '8e5d00', 'read 300+2', at(FRAME, '1800')],
    ['sgdt [rbx]', '0f0103', 'write 100+a'],
  ],
  'no access at all': [
    ['lea rax, [rbx]', '488d03', ''],
    ['prefetcht0 [rbx]', '0f180b', ''],
    ['nop dword ptr [rbx]', '0f1f03', ''],
  ],
  SSE: [
    ['movups xmm0, [rbx]', '0f1003', 'read 100+10'],
    ['movaps [rbx], xmm0', '0f2903', 'write 100+10'],
    ['movdqu xmm0, [rbx+1]', 'f30f6f4301', 'read 101+10'],
    ['movq xmm0, qword ptr [rbx]', 'f30f7e03', 'read 100+8'],
    ['movd xmm0, dword ptr [rbx]', '660f6e03', 'read 100+4'],
    ['movhps xmm0, [rbx]', '0f1603', 'read 100+8'],
    ['movlps [rbx], xmm0', '0f1303', 'write 100+8'],
    ['paddb xmm0, [rbx]', '660ffc03', 'read 100+10'],
    ['addsd xmm0, [rbx]', 'f20f5803', 'read 100+8'],
    ['ucomiss xmm0, [rbx]', '0f2e03', 'read 100+4'],
    ['cvtsi2sd xmm0, dword ptr [rbx]', 'f20f2a03', 'read 100+4'],
    ['maskmovdqu xmm0, xmm1', '660ff7c1', 'write 500+10'],
    ['ldmxcsr [rbp]', '0fae5500', 'read 300+4', at(FRAME, '801f0000')],
    ['stmxcsr [rbx]', '0fae1b', 'write 100+4'],
    ['fxsave64 [rbx]', '480fae03', 'write 100+200'],
    ['fxrstor64 [rbp]', '480fae4d00', 'read 300+200', at(FRAME, '00'.repeat(0x200))],
  ],
  x87: [
    ['fld dword ptr [rbx]', 'd903', 'read 100+4'],
    ['fld qword ptr [rbx]', 'dd03', 'read 100+8'],
    ['fld tbyte ptr [rbx]', 'db2b', 'read 100+a'],
    ['fild word ptr [rbx]', 'df03', 'read 100+2'],
    ['fild qword ptr [rbx]', 'df2b', 'read 100+8'],
    ['fst dword ptr [rbx]', 'd913', 'write 100+4'],
    ['fstp qword ptr [rbx]', 'dd1b', 'write 100+8'],
    ['fstp tbyte ptr [rbx]', 'db3b', 'write 100+a'],
    ['fistp dword ptr [rbx]', 'db1b', 'write 100+4'],
    ['fbstp [rbx]', 'df33', 'write 100+a'],
    ['fldcw [rbp]', 'd96d00', 'read 300+2', at(FRAME, '7f03')],
    ['fnstcw [rbx]', 'd93b', 'write 100+2'],
    ['fnstsw [rbx]', 'dd3b', 'write 100+2'],
    ['fnstenv [rbx]', 'd933', 'write 100+1c'],
  ],
  'the stack': [
    ['push rax', '50', 'write 7f8+8'],
    ['push [rbx]', 'ff33', 'read 100+8, write 7f8+8'],
    ['pop rax', '58', 'read 800+8'],
    ['pop [rbx]', '8f03', 'read 800+8, write 100+8'],
    ['pushfq', '9c', 'write 7f8+8'],
    ['popfq', '9d', 'read 800+8', at(STACK, '4602000000000000')],
    ['call next', 'e800000000', 'write 7f8+8'],
    ['call [rbp]', 'ff5500', 'read 300+8, write 7f8+8'],
    ['jmp [rbp]', 'ff6500', 'read 300+8'],
    ['ret', 'c3', 'read 800+8'],
    ['ret 8', 'c20800', 'read 800+8'],
    ['enter 16, 0', 'c8100000', 'write 7f8+8'],
    ['enter 16, 2', 'c8100002', 'write 7f8+8, write 7f0+8, write 7e8+8, read 2f8+8'],
    ['leave', 'c9', 'read 300+8'],
    ['iretq', '48cf', 'read 800+8, read 808+8, read 810+8, read 818+8, read 820+8'],
  ],
  'read, modify, write': [
    ['add [rbx], rax', '480103', 'read 100+8, write 100+8'],
    ['adc byte ptr [rbx], 3', '801303', 'read 100+1, write 100+1'],
    ['xor dword ptr [rbx], imm', '813378563412', 'read 100+4, write 100+4'],
    ['inc word ptr [rbx]', '66ff03', 'read 100+2, write 100+2'],
    ['neg qword ptr [rbx]', '48f71b', 'read 100+8, write 100+8'],
    ['not byte ptr [rbx]', 'f613', 'read 100+1, write 100+1'],
    ['shl dword ptr [rbx], 3', 'c12303', 'read 100+4, write 100+4'],
    ['rcr qword ptr [rbx], cl', '48d31b', 'read 100+8, write 100+8'],
    ['shld [rbx], rax, 5', '480fa40305', 'read 100+8, write 100+8'],
    ['xchg [rbx], rax', '488703', 'read 100+8, write 100+8'],
    ['cmpxchg [rbx], ecx', '0fb10b', 'read 100+4, write 100+4'],
    ['lock add [rbx], rax', 'f0480103', 'read 100+8, write 100+8'],
    ['lock inc byte ptr [rbx]', 'f0fe03', 'read 100+1, write 100+1'],
    ['lock xadd [rbx], rax', 'f0480fc103', 'read 100+8, write 100+8'],
    ['lock cmpxchg [rbx], rcx, unequal', 'f0480fb10b', 'read 100+8, write 100+8'],
    [
      'lock cmpxchg [rbx], rcx, equal',
      'f0480fb10b',
      'read 100+8, write 100+8',
      at(0x100, '1877665544332211'),
    ],
    ['lock cmpxchg8b [rbx]', 'f00fc70b', 'read 100+8, write 100+8'],
    ['lock cmpxchg16b [rbx], unequal', 'f0480fc70b', 'read 100+10, write 100+10'],
    [
      'lock cmpxchg16b [rbx], equal',
      'f0480fc70b',
      'read 100+10, write 100+10',
      at(0x100, '18776655443322117700000000000000'),
    ],
  ],
  'reads that only set flags or a register': [
    ['add rax, [rbx]', '480303', 'read 100+8'],
    ['cmp [rbx], rax', '483903', 'read 100+8'],
    ['cmp rax, [rbx]', '483b03', 'read 100+8'],
    ['test [rbx], eax', '8503', 'read 100+4'],
    ['imul rax, [rbx]', '480faf03', 'read 100+8'],
    ['imul eax, [rbx], 7', '6b0307', 'read 100+4'],
    ['mul qword ptr [rbx]', '48f723', 'read 100+8'],
    ['div dword ptr [rbp]', 'f77500', 'read 300+4', at(FRAME, '34120000')],
    ['crc32 eax, dword ptr [rbx]', 'f20f38f103', 'read 100+4'],
    ['popcnt rax, [rbx]', 'f3480fb803', 'read 100+8'],
    ['bsf rax, [rbx]', '480fbc03', 'read 100+8'],
  ],
  'bits of a string of operands': [
    ['bt dword ptr [rbx], 5', '0fba2305', 'read 100+4'],
    ['bt [rbx], rcx', '480fa30b', 'read 100+8'],
    ['bt [rbx], r8, bit 200', '4c0fa303', 'read 118+8'],
    ['bt [rbx], r9, bit -1', '4c0fa30b', 'read f8+8'],
    ['bts [rbx], r9d, bit -1', '440fab0b', 'read fc+4, write fc+4'],
    ['lock btr [rbx], ecx', 'f00fb30b', 'read 100+4, write 100+4'],
    ['btc [rbx], r8w, bit 200', '66440fbb03', 'read 118+2, write 118+2'],
  ],
  strings: [
    ['movsb', 'a4', 'read 400+1, write 500+1'],
    ['movsq', '48a5', 'read 400+8, write 500+8'],
    ['cmpsb', 'a6', 'read 400+1, read 500+1'],
    ['scasw', '66af', 'read 500+2'],
    ['lodsq', '48ad', 'read 400+8'],
    ['stosd', 'ab', 'write 500+4'],
    [
      'rep movsd',
      'f3a5',
      [0, 4, 8].map((i) => `read ${hx(0x400 + i)}+4, write ${hx(0x500 + i)}+4`).join(', '),
    ],
    ['rep stosb', 'f3aa', 'write 500+1, write 501+1, write 502+1'],
    ['rep lodsb', 'f3ac', 'read 400+1, read 401+1, read 402+1'],
    ['repe cmpsb, unequal at once', 'f3a6', 'read 400+1, read 500+1'],
    ['repe cmpsb, equal once', 'f3a6', 'read 400+1, read 500+1, read 401+1, read 501+1', at(0x400, '05aa')],
    ['repne scasb, found', 'f2ae', 'read 500+1, read 501+1', at(0x501, '18')],
  ],
};

function hx(value: number): string {
  return value.toString(16);
}

/** Known SSE and x87 state before the form: movups xmm0, [r14]; movups xmm1, [r14+16]; fninit; fld1. */
const PROLOGUE = hexBytes('410f1006 410f104e10 dbe3 d9e8');
/** And where it can be compared: movups [r14+0x100], xmm0; fnsave [r14+0x200]; hlt. */
const EPILOGUE = hexBytes('410f118600010000 41ddb600020000 f4');
const FORM = CODE + BigInt(PROLOGUE.length);
const MOST_INSTRUCTIONS = 100;

const BEFORE = {
  rax: 0x1122334455667718n,
  rcx: 3n,
  rdx: 0x77n,
  rbx: DATA + 0x100n,
  rsp: DATA + BigInt(STACK),
  rbp: DATA + BigInt(FRAME),
  rsi: DATA + 0x400n,
  rdi: DATA + 0x500n,
  r8: 200n,
  r9: 0xffff_ffff_ffff_ffffn,
  r10: 10n,
  r11: 11n,
  r12: DATA + 0x600n,
  r13: 2n,
  r14: SCRATCH,
  r15: 15n,
  rflags: 0x46n,
  fsBase: 0x10n,
  gsBase: DATA + 0x700n,
} satisfies Partial<Registers>;

const machine = createFlatMachine();
afterAll(() => machine.close());

/** Fills both frames of data; what an IRETQ or a RET finds on the stack leads to the epilogue. */
function prepare(code: Buffer, memory: Memory | undefined): void {
  const data = Buffer.from(Array.from({ length: 0x2000 }, (_, i) => (i * 37 + (i >> 8)) & 0xff));
  const epilogue = FORM + BigInt(code.length);
  const frame = [epilogue, SELECTORS.kernelCode, 0x246n, DATA + 0x900n, SELECTORS.kernelData];
  for (const [index, value] of frame.entries()) data.writeBigUInt64LE(value, STACK + index * 8);
  data.writeBigUInt64LE(epilogue, FRAME);
  if (memory !== undefined) data.set(hexBytes(memory.bytes), memory.at);
  machine.writePhysical(DATA, data);
  const scratch = Buffer.alloc(0x1000);
  scratch.fill(0xc1, 0, 32);
  machine.writePhysical(SCRATCH, scratch);
  machine.writePhysical(CODE, Buffer.concat([PROLOGUE, code, EPILOGUE]));
}

interface Outcome {
  readonly traps: Trap[];
  readonly atTraps: Registers[];
  readonly registers: Registers;
  readonly memory: Buffer;
}

type Mode = 'stepped' | 'free running';

function execute([, digits, , memory]: Row, mode: Mode, access: number): Outcome {
  const code = hexBytes(digits);
  prepare(code, memory);
  setAccess(machine, DATA, 2, access);
  machine.setRegisters(0, { ...BEFORE, rip: CODE });
  const traps: Trap[] = [];
  const atTraps: Registers[] = [];
  for (let turn = 0; turn < MOST_INSTRUCTIONS; turn++) {
    const trap = mode === 'stepped' ? machine.step(0, 1).trap : machine.run(10_000).traps[0];
    if (trap !== undefined) {
      traps.push(trap);
      atTraps.push(machine.registers(0));
      machine.complete(0);
    }
  }
  const registers = machine.registers(0);
  // It has reached its end, and nothing else.
  expect(registers.rip).toBe(FORM + BigInt(code.length + EPILOGUE.length));
  return {
    traps,
    atTraps,
    registers,
    memory: Buffer.concat([machine.readPhysical(DATA, 0x2000), machine.readPhysical(SCRATCH, 0x1000)]),
  };
}

function spelled(traps: readonly Trap[]): string {
  return traps
    .map(
      ({ access, gva, length }) =>
        `${access} ${hex(gva - DATA)
          .slice(2)
          .padStart(2, '0')}+${hx(length)}`,
    )
    .join(', ');
}

const ALL = 7;

for (const [kind, rows] of Object.entries(FORMS)) {
  describe(`${kind}: the trap is exact, and completed the instruction has had its normal effect`, () => {
    for (const mode of ['stepped', 'free running'] as const) {
      for (const row of rows)
        it(`${row[0]} (${mode})`, () => {
          const plain = execute(row, mode, ALL);
          expect(plain.traps).toEqual([]);
          const trapped = execute(row, mode, ACCESS_EXECUTE);
          expect(spelled(trapped.traps)).toBe(row[2]);
          for (const trap of trapped.traps) {
            expect(trap).toMatchObject({ kind: 'violation', rip: FORM, gpa: trap.gva, vcpu: 0 });
            expect(trap.instruction.toString('hex')).toBe(row[1]);
          }
          const [first] = trapped.atTraps;
          if (first !== undefined) expect(first).toMatchObject({ ...BEFORE, rip: FORM });
          expect(trapped.registers).toEqual(plain.registers);
          expect(trapped.memory.equals(plain.memory)).toBe(true);
        });
    }
  });
}

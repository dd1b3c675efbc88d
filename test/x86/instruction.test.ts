import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  Disassembler,
  decodeInstruction,
  gprIndex,
  gprName,
  isHighByte,
  MAX_INSTRUCTION_LENGTH,
  Register,
} from '../../src/x86/instruction.js';
import { memoryAccess } from '../../src/x86/memory-access.js';
import { GPR_NAMES } from '../../src/x86/registers.js';
import { hexBytes } from '../machine/support.js';

const RIP = 0xffff_f800_0000_1000n;
const decode = (code: string) => decodeInstruction(hexBytes(code), RIP)!;
const bit = (name: (typeof GPR_NAMES)[number]) => 1 << GPR_NAMES.indexOf(name);

describe('decodeInstruction', () => {
  it('a table load', () => {
    expect(decode('42 8b 8c aa 1c a9 4e 80')).toMatchObject({
      ip: RIP,
      length: 8,
      writtenGprs: bit('rcx'),
      writesFlags: false,
      operands: [
        { kind: 'register', register: Register.ECX, size: 4 },
        {
          kind: 'memory',
          base: Register.RDX,
          index: Register.R13,
          scale: 4,
          displacement: -0x7fb156e4n,
          size: 4,
          addressSize: 8,
          segmented: false,
          reads: true,
          writes: false,
          explicit: true,
        },
      ],
    });
  });

  it.each([
    [
      'an address relative to RIP is absolute',
      'lea',
      '48 8d 15 f9 ff ff ff',
      { displacement: BigInt.asIntN(64, RIP) },
    ],
    ['lea accesses nothing', 'lea', '8d 04 80', { reads: false, writes: false, size: 0 }],
    ['an address of 32 bits', 'mov', '67 8b 8c 82 00 10 00 00', { addressSize: 4 }],
    ['a segment with a base of its own', 'mov', '65 8b 8c 82 00 10 00 00', { segmented: true }],
    ['a segment without one', 'mov', '2e 8b 8c 82 00 10 00 00', { segmented: false }],
  ])('%s', (_, __, code, operand) => {
    expect(decode(code).operands[1]).toMatchObject({ kind: 'memory', ...operand });
  });

  it.each([
    ['cpuid', '0f a2', bit('rax') | bit('rcx') | bit('rdx') | bit('rbx')],
    ['push rcx', '51', bit('rsp')],
    ['rep movsb', 'f3 a4', bit('rcx') | bit('rsi') | bit('rdi')],
    ['xchg eax, r8d', '44 87 c0', bit('rax') | bit('r8')],
    ['mul ecx', 'f7 e1', bit('rax') | bit('rdx')],
    ['mov ah, cl', '88 cc', bit('rax')],
    ['cmpxchg [rsp+32], ecx, which may write eax', '0f b1 4c 24 20', bit('rax')],
    ['cmp eax, ecx', '39 c8', 0],
  ])('what %s may write', (_, code, written) => {
    expect(decode(code).writtenGprs).toBe(written);
  });

  it('an immediate is extended as the processor does it', () => {
    expect(decode('48 83 f8 ff').operands[1]).toEqual({ kind: 'immediate', value: 0xffff_ffff_ffff_ffffn });
    expect(decode('48 c7 c0 00 00 00 80').operands[1]).toEqual({
      kind: 'immediate',
      value: 0xffff_ffff_8000_0000n,
    });
  });

  it.each([
    ['no bytes', ''],
    ['an invalid opcode', '06'],
    ['an instruction that is cut off', '8b 8c 82 1c a9 4e'],
    ['more prefixes than fit', `${'66'.repeat(15)}90`],
    ['lock on what cannot be locked', 'f0 8b 0a'],
  ])('%s is no instruction', (_, code) => {
    expect(decodeInstruction(hexBytes(code), RIP)).toBeUndefined();
  });

  it('any bytes give an instruction of 1 to 15 of them, or none', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 20 }), (bytes) => {
        const instruction = decodeInstruction(bytes, RIP);
        if (instruction === undefined) return;
        const { length } = instruction;
        expect(length).toBeGreaterThan(0);
        expect(length).toBeLessThanOrEqual(Math.min(bytes.length, MAX_INSTRUCTION_LENGTH));
        expect([...instruction.bytes]).toEqual([...bytes.subarray(0, length)]);
        memoryAccess(instruction, 'read');
        memoryAccess(instruction, 'write');
      }),
      { numRuns: 3000 },
    );
  });

  it('what was decoded stays as it was when more is decoded', () => {
    const disassembler = new Disassembler(hexBytes('8b 8c 82 00 10 00 00 48 01 d1'), 0x1000n);
    const load = disassembler.at(0);
    const copy = structuredClone(load);
    expect(disassembler.at(7)).toMatchObject({ ip: 0x1007n, length: 3 });
    expect(load).toEqual(copy);
    expect(disassembler.at(-1)).toBeUndefined();
    expect(disassembler.at(10)).toBeUndefined();
    disassembler.free();
  });

  it('what was decoded stays as it was when the buffer it came from changes', () => {
    const bytes = hexBytes('8b 8c 82 00 10 00 00');
    const load = decodeInstruction(bytes, RIP)!;
    bytes.fill(0x90);
    expect(Buffer.from(load.bytes).toString('hex')).toBe('8b8c8200100000');
  });
});

describe('registers', () => {
  it('each part belongs to its register', () => {
    expect([Register.AL, Register.AH, Register.AX, Register.EAX, Register.RAX].map(gprIndex)).toEqual(
      Array(5).fill(0),
    );
    expect([Register.R15L, Register.R15W, Register.R15D, Register.R15].map(gprName)).toEqual(
      Array(4).fill('r15'),
    );
    expect([Register.SPL, Register.ESP].map(gprName)).toEqual(['rsp', 'rsp']);
    expect([Register.AH, Register.BH, Register.SPL, Register.AL].map(isHighByte)).toEqual([
      true,
      true,
      false,
      false,
    ]);
  });

  it('others are none', () => {
    for (const register of [
      Register.None,
      Register.RIP,
      Register.EIP,
      Register.CS,
      Register.XMM0,
      Register.CR0,
    ]) {
      expect(gprIndex(register)).toBe(-1);
      expect(() => gprName(register)).toThrow(RangeError);
    }
  });
});

describe('memoryAccess', () => {
  it.each([
    ['mov cl, [rax]', '8a 08', 'read', 1, '1-byte'],
    ['mov cx, [rax]', '66 8b 08', 'read', 2, '2-byte'],
    ['mov ecx, [rax]', '8b 08', 'read', 4, '4-byte'],
    ['mov rcx, [rax]', '48 8b 08', 'read', 8, '8-byte'],
    ['movups xmm0, [rax]', '0f 10 00', 'read', 16, '16-byte'],
    ['vmovups ymm0, [rax]', 'c5 fc 10 00', 'read', 32, '32-byte'],
    ['movzx ecx, byte ptr [rax]', '0f b6 08', 'read', 1, '1-byte'],
    ['cmp [rax], ecx', '39 08', 'read', 4, '4-byte'],
    ['add [rax], ecx', '01 08', 'write', 4, '4-byte'],
    ['mov [rax], rcx', '48 89 08', 'write', 8, '8-byte'],
    ['lodsb', 'ac', 'read', 1, 'lods'],
    ['rep lodsq', 'f3 48 ad', 'read', 8, 'rep lods'],
    ['rep movsb reads', 'f3 a4', 'read', 1, 'rep movs'],
    ['rep movsd writes', 'f3 a5', 'write', 4, 'rep movs'],
    ['movsd', 'a5', 'read', 4, 'movs'],
    ['repne scasb', 'f2 ae', 'read', 1, 'rep scas'],
    ['repe cmpsw', 'f3 66 a7', 'read', 2, 'rep cmps'],
    ['rep stosq', 'f3 48 ab', 'write', 8, 'rep stos'],
    ['push rcx writes what no operand names', '51', 'write', undefined, 'other'],
    ['mov ecx, eax has no memory', '89 c1', 'read', undefined, 'other'],
    ['mov [rax], ecx does not read', '89 08', 'read', undefined, 'other'],
  ] as const)('%s', (_, code, direction, bytes, form) => {
    expect(memoryAccess(decode(code), direction)).toEqual({ bytes, form });
  });
});

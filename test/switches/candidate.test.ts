import { describe, expect, it } from 'vitest';
import { CANDIDATE_RULES, checkCandidate } from '../../src/switches/candidate.js';
import { decodeInstruction, type Instruction, type MemoryOperand } from '../../src/x86/instruction.js';
import { hexBytes } from '../machine/support.js';

const KERNEL = { start: 0xffff_f800_1000_0000n, end: 0xffff_f800_1100_0000n };
const SSDT = { start: 0xffff_f800_1080_0000n, end: 0xffff_f800_1080_0740n };
const TABLE = 0xffff_f800_1020_0000n;

function decode(code: string): Instruction {
  return decodeInstruction(hexBytes(code), KERNEL.start)!;
}

const check = (instruction: Instruction, gva = TABLE) => checkCandidate(instruction, gva, KERNEL, SSDT);

/** mov ecx, [rdx+rax*4+0x4ea91c], the example of HVMI's documentation */
const LOAD = decode('8b 8c 82 1c a9 4e 00');
const memory = LOAD.operands[1] as MemoryOperand;
const withOperands = (...operands: Instruction['operands']): Instruction => ({ ...LOAD, operands });

describe('candidate rules 0 to 9', () => {
  it("are those of HVMI's documentation, in its order", () => {
    expect(CANDIDATE_RULES).toHaveLength(10);
    expect(check(LOAD)).toEqual({ accepted: true });
  });

  describe('each instruction breaks one rule only', () => {
    it.each([
      [0, 'add ecx, [rdx+rax*4+d]', decode('03 8c 82 1c a9 4e 00')],
      [0, 'xor ecx, [rdx+rax*4+d]', decode('33 8c 82 1c a9 4e 00')],
      [0, 'movbe ecx, [rdx+rax*4+d]', decode('0f 38 f0 8c 82 1c a9 4e 00')],
      [0, 'cmovne ecx, [rdx+rax*4+d]', decode('0f 45 8c 82 1c a9 4e 00')],
      [0, 'movsxd ecx, [rdx+rax*4+d]', decode('63 8c 82 1c a9 4e 00')],
      [1, 'a third operand', withOperands(...LOAD.operands, LOAD.operands[0]!)],
      [2, 'two memory operands', withOperands(memory, memory)],
      [3, 'mov ecx, imm32', decode('c7 c1 1c a9 4e 00')],
      [4, 'mov ecx, [rdx+d]', decode('8b 8a 1c a9 4e 00')],
      [4, 'mov ecx, [r12+d], which needs a SIB byte', decode('41 8b 8c 24 1c a9 4e 00')],
      [4, 'mov ecx, [rip+d]', decode('8b 0d 1c a9 4e 00')],
      [4, 'mov eax, [moffs]', decode('a1 1c a9 4e 00 00 f8 ff ff')],
      [5, 'no read', withOperands(LOAD.operands[0]!, { ...memory, reads: false })],
      [5, 'a write too', withOperands(LOAD.operands[0]!, { ...memory, writes: true })],
      [6, 'mov rcx, [rdx+rax*4+d]', decode('48 8b 8c 82 1c a9 4e 00')],
      [6, 'mov cx, [rdx+rax*4+d]', decode('66 8b 8c 82 1c a9 4e 00')],
      [6, 'mov cl, [rdx+rax*4+d]', decode('8a 8c 82 1c a9 4e 00')],
      [6, 'mov ds, [rdx+rax*4+d]', decode('8e 9c 82 1c a9 4e 00')],
      [7, 'mov ecx, [rdx+rax*4]', decode('8b 0c 82')],
      [7, 'mov ecx, [rdx+rax*4+0x10]', decode('8b 4c 82 10')],
      [7, 'mov r9d, [r10+r11*4]', decode('47 8b 0c 9a')],
    ])('rule %i: %s', (rule, _, instruction) => {
      expect(check(instruction)).toEqual({ accepted: false, rule, reason: CANDIDATE_RULES[rule] });
    });

    it.each([
      [8, 'below the kernel', KERNEL.start - 1n],
      [8, 'behind the kernel', KERNEL.end],
      [8, 'in user space', 0x7ff6_1234_0000n],
      [9, 'at the start of the SSDT', SSDT.start],
      [9, 'at the end of the SSDT', SSDT.end - 1n],
    ])('rule %i: a read %s', (rule, _, gva) => {
      expect(check(LOAD, gva)).toEqual({ accepted: false, rule, reason: CANDIDATE_RULES[rule] });
    });
  });

  it('the first broken rule is named', () => {
    expect(check(decode('89 8c 82 1c a9 4e 00'))).toMatchObject({ rule: 2 }); // mov [mem], ecx
    expect(check(decode('8b c8'))).toMatchObject({ rule: 3 }); // mov ecx, eax
    expect(check(decode('48 8b 0a'), 0n)).toMatchObject({ rule: 4 }); // mov rcx, [rdx]
    expect(check(decode('48 8b 0c c2'), 0n)).toMatchObject({ rule: 6 }); // mov rcx, [rdx+rax*8]
    expect(check(decode('8b 0c 82'), 0n)).toMatchObject({ rule: 7 });
  });

  it.each([
    ['five bytes are enough', '42 8b 4c a2 10'],
    ['r12 as the index, whose low bits mean none', '42 8b 8c a2 1c a9 4e 00'],
    ['no base', '8b 0c 85 1c a9 4e 00'],
    ['rbp and r13 as the base', '43 8b 8c a5 1c a9 4e 00'],
    ['any scale: no rule is about it', '8b 8c 02 1c a9 4e 00'],
    ['an address of 32 bits: no rule is about it', '67 8b 8c 82 1c a9 4e 00'],
    ['dst == idx', '8b 84 82 1c a9 4e 00'],
  ])('accepted: %s', (_, code) => {
    expect(check(decode(code))).toEqual({ accepted: true });
  });

  it.each([
    ['the first byte of the kernel', KERNEL.start],
    ['the last byte of the kernel', KERNEL.end - 1n],
    ['just below the SSDT', SSDT.start - 1n],
    ['just behind the SSDT', SSDT.end],
  ])('accepted: a read of %s', (_, gva) => {
    expect(check(LOAD, gva)).toEqual({ accepted: true });
  });

  it('where the SSDT is not known, rule 9 refuses nothing', () => {
    expect(checkCandidate(LOAD, SSDT.start, KERNEL, undefined)).toEqual({ accepted: true });
  });
});

import { describe, expect, it } from 'vitest';
import { effectsOf, STATUS_FLAGS } from '../../src/x86/effects.js';
import { decodeInstruction } from '../../src/x86/instruction.js';
import { GPR_NAMES } from '../../src/x86/registers.js';
import { hexBytes } from '../machine/support.js';

function effects(code: string) {
  const { reads, overwrites } = effectsOf(decodeInstruction(hexBytes(code), 0x1000n)!);
  const named = (mask: number) => [
    ...GPR_NAMES.filter((_, gpr) => mask & (1 << gpr)),
    ...(mask & STATUS_FLAGS ? [(mask & STATUS_FLAGS) === STATUS_FLAGS ? 'flags' : 'some flags'] : []),
  ];
  return { reads: named(reads), overwrites: named(overwrites) };
}

describe('what an instruction reads and overwrites', () => {
  it.each([
    ['mov eax, 1: the upper half too', 'b8 01 00 00 00', [], ['rax']],
    ['mov al, 1: the rest stays', 'b0 01', [], []],
    ['mov ax, 1: the rest stays', '66 b8 01 00', [], []],
    ['movzx eax, cl', '0f b6 c1', ['rcx'], ['rax']],
    ['mov eax, [rbx+rcx*4]', '8b 04 8b', ['rcx', 'rbx'], ['rax']],
    ['mov [rbx], rax', '48 89 03', ['rax', 'rbx'], []],
    ['add eax, ecx', '01 c8', ['rax', 'rcx'], ['flags']],
    ['xor eax, eax: of what it does not read', '31 c0', [], ['rax', 'some flags']],
    ['xor eax, ecx', '31 c8', ['rax', 'rcx'], ['some flags']],
    ['inc eax: the carry stays', 'ff c0', ['rax'], ['some flags']],
    ['cmove eax, ecx: the destination may stay', '0f 44 c1', ['rax', 'rcx', 'some flags'], []],
    ['cmove rax, rcx', '48 0f 44 c1', ['rax', 'rcx', 'some flags'], []],
    ['sete al', '0f 94 c0', ['some flags'], []],
    ['adc eax, 0', '83 d0 00', ['rax', 'some flags'], ['flags']],
    ['shl eax, cl: the count may be 0', 'd3 e0', ['rax', 'rcx'], []],
    ['shl eax, 0', 'c1 e0 00', ['rax'], []],
    ['shl eax, 1', 'd1 e0', ['rax'], ['some flags']],
    ['bsf eax, ecx: the destination may stay', '0f bc c1', ['rcx'], ['some flags']],
    ['repe cmpsb: the count may be 0', 'f3 a6', ['rcx', 'rsi', 'rdi'], []],
    ['cdqe', '48 98', ['rax'], []],
    ['pushfq', '9c', ['rsp', 'flags'], []],
    ['lahf', '9f', ['some flags'], []],
  ])('%s', (_, code, reads, overwrites) => {
    expect(effects(code)).toMatchObject({ reads: expect.arrayContaining(reads), overwrites });
  });
});

import { describe, expect, test } from 'vitest';
import { onlyReadOf } from '../../src/x86/only-read.js';
import { hexBytes } from '../machine/support.js';

describe('the only read of an instruction', () => {
  test.each([
    ['mov ecx, [rdx+r13*4-…]', '428b8caa1ca94e80', 4],
    ['movzx eax, byte ptr [rcx]', '0fb601', 1],
    ['movdqu xmm0, [rax]', 'f30f6f00', 16],
    ['vmovdqu ymm0, [rax]', 'c5fe6f00', 32],
    ['add [rax], ebx: read and written', '0118', 4],
    ['push [rax]: the stack is only written', 'ff30', 8],
    ['movsq: written elsewhere', '48a5', 8],
    ['lodsb', 'ac', 1],
    ['ret: from the stack', 'c3', 8],
    ['xlatb', 'd7', 1],
    ['fxrstor', '0fae08', 512],
  ])('%s', (_name, code, bytes) => {
    expect(onlyReadOf(hexBytes(code))).toBe(bytes);
  });

  test.each([
    ['cmpsd reads twice', 'a7'],
    ['rep movsq repeats', 'f348a5'],
    ['rep lodsb repeats', 'f3ac'],
    ['a gather reads wherever its elements say', 'c4e27190049d00000000'],
    ['xrstor reads a size that varies', '0fae28'],
    ['lea reads nothing', '8d00'],
    ['nop reads nothing', '90'],
    ['no instruction', '06'],
    ['an instruction that is cut off', '428b8c'],
    ['no bytes', ''],
  ])('%s', (_name, code) => {
    expect(onlyReadOf(hexBytes(code))).toBeUndefined();
  });
});

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { GUEST_DIRECTORY } from '../../src/guest/artefacts.js';
import { decodeInstruction, Mnemonic } from '../../src/x86/instruction.js';
import { memoryAccess } from '../../src/x86/memory-access.js';
import {
  CODE_PAGE,
  CROSSING,
  DETOUR,
  READ_1,
  READ_2,
  READ_4,
  READ_8,
  STRING,
  WRITTEN,
} from '../../src/xen-rig/watched-guest.js';

const CODE = readFileSync(join(GUEST_DIRECTORY, 'pvh/watched.bin'));

const at = (rip: bigint) => decodeInstruction(CODE.subarray(Number(rip - CODE_PAGE.gva)), rip)!;

describe('the guest of the conformance checks', () => {
  test.each([
    ['8 bytes', READ_8, 'read', '8-byte'],
    ['4 bytes', READ_4, 'read', '4-byte'],
    ['2 bytes', READ_2, 'read', '2-byte'],
    ['1 byte', READ_1, 'read', '1-byte'],
    ['8 bytes of two pages', CROSSING, 'read', '8-byte'],
    ['a string', STRING, 'read', 'rep movs'],
    ['8 bytes', WRITTEN, 'write', '8-byte'],
  ] as const)('makes each access where the checks expect it: %s, %s', (_, { rip }, direction, form) => {
    expect(memoryAccess(at(rip), direction).form).toBe(form);
  });

  test('counts its detours where they are sent to', () => {
    expect(at(DETOUR).mnemonic).toBe(Mnemonic.Inc);
  });
});

import { describe, expect, it } from 'vitest';
import { Evacuation } from '../../src/handlers/evacuation.js';
import type { Registers } from '../../src/x86/registers.js';

const RIP = 0xffff_8000_0000_1000n;
const BACK = 0xffff_8000_0000_2000n;
const entry = { register: 'rax', offset: 0x100n, factor: 16n } as const;
const evacuation = new Evacuation('rcx', Uint32Array.of(7, 8), new Map([[RIP, { rip: BACK, entry }]]));
const at = (rip: bigint, rax: bigint) => evacuation.registersFor({ rip, rax, rcx: 1n } as Registers);

describe('a vCPU is left where it is', () => {
  it('when it does not stand at an instruction of the handler', () => {
    expect(at(RIP, 0x110n)).toEqual({ rip: BACK, rax: 0x110n, rcx: 8n });
    expect(at(RIP + 1n, 0x110n)).toBeUndefined();
  });

  it.each([0xf0n, 0x120n, 0x111n, 0n])('when its register leads to no entry: %x', (rax) => {
    expect(at(RIP, rax)).toBeUndefined();
  });
});

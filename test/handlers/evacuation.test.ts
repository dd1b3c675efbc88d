import { describe, expect, it } from 'vitest';
import { StacklessEvacuation } from '../../src/handlers/evacuation.js';

const RIP = 0xffff_8000_0000_1000n;
const BACK = 0xffff_8000_0000_2000n;
const entry = { register: 'rax', offset: 0x100n, factor: 16n } as const;
const evacuation = new StacklessEvacuation(
  'rcx',
  Uint32Array.of(7, 8),
  new Map([[RIP, { rip: BACK, entry }]]),
);
const at = (rip: bigint, rax: bigint) => evacuation.evacuate({ rip, rax, rcx: 1n });

describe('a vCPU is left where it is', () => {
  it('when it does not stand at an instruction of the handler', () => {
    expect(at(RIP, 0x110n)).toEqual({ changes: { rip: BACK, rcx: 8n } });
    expect(at(RIP + 1n, 0x110n)).toBeUndefined();
  });

  it.each([0xf0n, 0x120n, 0x111n, 0n])('when its register leads to no entry: %x', (rax) => {
    expect(at(RIP, rax)).toEqual({ mustWait: 'registers-not-of-handler' });
  });
});

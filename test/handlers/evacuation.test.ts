import { describe, expect, it } from 'vitest';
import { StacklessEvacuation } from '../../src/handlers/evacuation.js';

const RIP = 0xffff_8000_0000_1000n;
const SITE = 0xffff_8000_0000_2000n;
const BASE = 0xffff_8000_0000_0000n;
const index = { register: 'rax', offset: 0x100n, factor: 16n } as const;
const exits = new Map([
  [RIP, { rip: SITE, index }],
  [RIP + 4n, { rip: SITE }],
  [RIP + 8n, { rip: SITE, index: 1 }],
]);
const evacuation = new StacklessEvacuation({ idx: 'rax', bases: ['rdx'], baseValue: BASE }, 2, exits);
const at = (rip: bigint, rax: bigint) => evacuation.evacuate({ rip, rax, rdx: 1n });

describe('a thread goes back to the site', () => {
  it('with the registers that the load needs', () => {
    expect(at(RIP, 0x110n)).toEqual({ changes: { rip: SITE, rax: 1n, rdx: BASE } });
    expect(at(RIP + 4n, 0x110n)).toEqual({ changes: { rip: SITE } });
    expect(at(RIP + 8n, 0n)).toEqual({ changes: { rip: SITE, rax: 1n, rdx: BASE } });
  });
});

describe('a thread is left where it is', () => {
  it('when it does not stand at an instruction of the handler', () => {
    expect(at(RIP + 1n, 0x110n)).toBeUndefined();
  });

  it.each([0xf0n, 0x120n, 0x111n, 0n])('when its register leads to no entry: %x', (rax) => {
    expect(at(RIP, rax)).toEqual({ mustWait: 'registers-not-of-handler' });
  });

  it('when a register to read or to set is not known', () => {
    const mustWait = 'register-not-in-frame';
    expect(evacuation.evacuate({ rip: RIP, rdx: 1n })).toEqual({ mustWait });
    expect(evacuation.evacuate({ rip: RIP + 8n, rax: 1n })).toEqual({ mustWait });
  });
});

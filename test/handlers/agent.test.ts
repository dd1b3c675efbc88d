import { describe, expect, it } from 'vitest';
import { type AgentLoad, agentRegion, MAX_AGENT_LOADS } from '../../src/handlers/agent.js';
import { MAX_ENTRIES } from '../../src/handlers/refusal.js';
import { LOAD } from './load.js';

const ENTRIES = Uint32Array.of(0x1000, 0x2000);
const REGION = { gva: 0xffff_9000_0000_0001n, size: 0x10_0000 };

const loads = (count: number, length = 7): AgentLoad[] =>
  Array.from({ length: count }, (_, n) => ({
    load: { ...LOAD, gva: LOAD.gva + BigInt(n * 16), length },
    entries: ENTRIES,
  }));

function laidOut(count: number, length?: number) {
  const region = agentRegion(loads(count, length), REGION);
  if (region.refused !== undefined) throw new Error(`refused: ${region.refused}`);
  return region;
}

describe('the encoding', () => {
  it.each([
    [7, '6666666666cd14'],
    [8, '666666666666cd14'],
    [9, '66666666666666cd14'],
  ])('of a site of %i bytes is one INT 20 of that length', (length, bytes) => {
    const [relocation] = laidOut(1, length).relocations;
    expect(relocation!.site).toEqual({ gva: LOAD.gva, bytes: Buffer.from(bytes, 'hex') });
  });

  it("of a handler is the seed's, with blocks that end in IRETQ and are 11 bytes long", () => {
    const { region, dispatcher } = laidOut(1);
    const handler = region.bytes.subarray(-(3 + 47 + 2 * 11));
    const at = region.gva + BigInt(region.bytes.length - 2 * 11);
    const blocks = Buffer.alloc(8);
    blocks.writeBigUInt64LE(at);
    const half = (from: number) => blocks.subarray(from, from + 4).toString('hex');
    expect(handler.toString('hex')).toBe(
      [
        ...['5a', '59', '58'], // pop rdx; pop rcx; pop rax
        ...['9c', '4851', '4850', `c7442408${half(0)}`, `c744240c${half(4)}`, '486bc00b', '4801442408'],
        ...['4858', '4859', '48c74424f800000000', '9d', '40ffe1'],
        ...['40b900100000', '48cf', 'cccccc'],
        ...['40b900200000', '48cf', 'cccccc'],
      ].join(''),
    );
    expect(region.bytes.subarray(0, 15)).toEqual(Buffer.alloc(15, 0xcc));
    expect(dispatcher).toBe(region.gva + 15n + 144n + 16n);
  });
});

it('a pair that is taken out matches no address that an interrupt frame can hold', () => {
  const [pair] = laidOut(1).relocations[0]!.removal;
  const returnTo = pair!.bytes.readBigUInt64LE();
  expect(returnTo).not.toBe(BigInt.asUintN(64, BigInt.asIntN(57, returnTo)));
});

describe('a region is refused', () => {
  it('when it is too small, with the bytes that it needs', () => {
    const needed = laidOut(3).region.bytes.length;
    expect(agentRegion(loads(3), { ...REGION, size: needed - 1 })).toEqual({
      refused: 'region-too-small',
      needed,
    });
    expect(agentRegion(loads(3), { ...REGION, size: needed }).refused).toBeUndefined();
  });

  it('with more loads than the table has pairs', () => {
    expect(agentRegion(loads(MAX_AGENT_LOADS), REGION).refused).toBeUndefined();
    expect(agentRegion(loads(MAX_AGENT_LOADS + 1), REGION)).toEqual({ refused: 'too-many-loads' });
  });

  it('with two loads of one return address, of which one would get the entry of the other', () => {
    expect(agentRegion([...loads(2), ...loads(1)], REGION)).toEqual({
      refused: 'load-given-twice',
      load: LOAD.gva,
    });
  });

  it('with a load that no handler can replace, and says which', () => {
    const entries = new Uint32Array(MAX_ENTRIES + 1);
    const [first, second] = loads(2) as [AgentLoad, AgentLoad];
    expect(agentRegion([first, { ...second, entries }], REGION)).toEqual({
      refused: 'too-many-entries',
      load: second.load.gva,
    });
  });
});

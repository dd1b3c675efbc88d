import { describe, expect, it } from 'vitest';
import { InstructionCache } from '../../src/x86/instruction-cache.js';
import { hexBytes } from '../machine/support.js';

const RIP = 0xffff_f800_0000_1000n;
/** mov ecx, [rdx+rax*4+0x4ea91c] */
const LOAD = hexBytes('8b 8c 82 1c a9 4e 00');
const LENGTH = 7;
const NOP = Uint8Array.of(0x90);

function unexpected(): Uint8Array {
  throw new Error('read though it is cached');
}

function cacheWithLoad(): InstructionCache {
  const cache = new InstructionCache();
  cache.lookup(RIP, () => LOAD);
  return cache;
}

describe('InstructionCache', () => {
  it('decodes once and then does not read', () => {
    const cache = cacheWithLoad();
    const again = cache.lookup(RIP, unexpected);
    expect(again).toMatchObject({ ip: RIP, length: LENGTH });
    expect(cache.size).toBe(1);
  });

  it('bytes that are no instruction are an error that is not cached', () => {
    const cache = new InstructionCache();
    const invalid = hexBytes('06 06');
    const lookup = () => cache.lookup(RIP, () => invalid);
    expect(lookup).toThrow(expect.objectContaining({ code: 'GUEST_STRUCTURE_INVALID' }));
    expect(cache.size).toBe(0);
    expect(cache.lookup(RIP, () => LOAD).length).toBe(LENGTH);
  });

  it('an instruction that ends where the mapping does', () => {
    const cache = new InstructionCache();
    expect(cache.lookup(RIP, () => LOAD.subarray(0, LENGTH)).length).toBe(LENGTH);
    expect(() => cache.lookup(RIP + 1n, () => LOAD.subarray(0, LENGTH - 1))).toThrow(
      expect.objectContaining({ code: 'GUEST_STRUCTURE_INVALID' }),
    );
    expect(() => cache.lookup(RIP + 2n, () => new Uint8Array(0))).toThrow(
      expect.objectContaining({ code: 'GUEST_STRUCTURE_INVALID' }),
    );
  });

  it('what a reader of the bytes throws passes through', () => {
    const cache = new InstructionCache();
    expect(() => cache.lookup(RIP, unexpected)).toThrow('read though it is cached');
  });

  it.each([
    ['its first byte', 0, 1, true],
    ['its last byte', LENGTH - 1, 1, true],
    ['all of it', 0, LENGTH, true],
    ['more than it', -20, 40, true],
    ['bytes before it that reach its first', -3, 4, true],
    ['the bytes right before it', -3, 3, false],
    ['the byte right behind it', LENGTH, 1, false],
    ['nothing', 2, 0, false],
  ])('a change of %s', (_, offset, length, dropped) => {
    const cache = cacheWithLoad();
    expect(cache.invalidate(RIP + BigInt(offset), length)).toBe(dropped ? 1 : 0);
    expect(cache.size).toBe(dropped ? 0 : 1);
    if (dropped) expect(cache.lookup(RIP, () => hexBytes('e9 00 00 00 00 90 90')).length).toBe(5);
    else cache.lookup(RIP, unexpected);
  });

  it('a change drops an instruction of 15 bytes by its last byte', () => {
    const cache = new InstructionCache();
    const longest = hexBytes('66 66 66 66 66 66 66 66 66 66 66 66 66 66 90');
    expect(cache.lookup(RIP, () => longest).length).toBe(15);
    expect(cache.invalidate(RIP + 14n, 1)).toBe(1);
  });

  it('a change drops all instructions that overlap there, and no neighbour', () => {
    const cache = new InstructionCache();
    for (let offset = -2n; offset < 10n; offset++)
      cache.lookup(RIP + offset, () => (offset === 0n ? LOAD : NOP));
    expect(cache.invalidate(RIP + 3n, 2)).toBe(3); // the load, and the bytes 3 and 4
    expect(cache.size).toBe(9);
  });

  it('the half not used for longest is dropped at its capacity', () => {
    const cache = new InstructionCache(4);
    for (const offset of [0n, 1n, 2n, 3n]) cache.lookup(RIP + offset, () => NOP);
    cache.lookup(RIP, unexpected);
    cache.lookup(RIP + 4n, () => NOP);
    expect(cache.size).toBe(3);
    for (const offset of [0n, 3n, 4n]) cache.lookup(RIP + offset, unexpected);
    for (const offset of [1n, 2n]) expect(() => cache.lookup(RIP + offset, unexpected)).toThrow();
  });
});

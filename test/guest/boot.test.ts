import { describe, expect, it } from 'vitest';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import { readGuestModule } from '../../src/guest/lexer-module.js';
import { lexerText } from '../../src/guest/lexer-text.js';
import { BOOT_BLOCK, LEXER_PIECE_BYTES, loadGuest } from '../../src/guest/loader.js';
import { readGuestReport } from '../../src/guest/report.js';
import { createMachine } from '../../src/machine/create-machine.js';
import { nextRandom } from '../../src/random.js';
import { PAGE_SIZE } from '../../src/vmi/address.js';
import { SteppedGuest } from './stepped-guest.js';

const LARGE_PAGE = 2n << 20n;
const SEEDS = 20;
const MEMORY_MB = [32, 64, 128, 256, 512, 1024];

/** Runs until everything that the kernel starts has done something. */
function bootFully(guest: SteppedGuest): void {
  guest.until(
    ({ streams, userLoops, systemCalls, processors }) =>
      streams.length === 3 * guest.machine.vcpuCount + 1 &&
      streams.every(({ running }) => running > 0n) &&
      processors.every(({ ticks, dpcs }) => ticks > 0n && dpcs > 0n) &&
      userLoops > 0n &&
      systemCalls > 0n,
    'run every part of its workload',
  );
  expect(guest.report().bugCheck).toBeUndefined();
  expect(guest.report().userErrors).toBe(0n);
}

/** What the kernel takes from its pool and its stacks is what the loader has left for it. */
function expectNothingOverrun(guest: SteppedGuest): void {
  const given = (field: keyof typeof BOOT_BLOCK) =>
    guest.readU64(guest.loaded.bootBlock + BigInt(BOOT_BLOCK[field]));
  expect(guest.readU64(guest.symbol('MmPoolNext'))).toBeLessThanOrEqual(given('poolEnd'));
  expect(guest.readU64(guest.symbol('MmStackNext'))).toBe(given('stacksEnd'));
}

describe('the guest boots', () => {
  let random = 0x5eed;
  const cases = Array.from({ length: SEEDS }, (_, index) => {
    random = nextRandom(random);
    return { seed: random, vcpus: 1 + (index % 8), memoryMB: MEMORY_MB[index % MEMORY_MB.length]! };
  });

  it.each(cases)('with seed $seed, $vcpus vCPUs and $memoryMB MB', (options) => {
    const guest = new SteppedGuest(options);
    const { kernelBase } = guest.loaded;
    expect(kernelBase % LARGE_PAGE).toBe(0n);
    expect(kernelBase >> 40n).toBe(0xfffff8n);
    bootFully(guest);
    expectNothingOverrun(guest);
  });

  it('with as many vCPUs as it supports', () => {
    const guest = new SteppedGuest({ vcpus: 32, memoryMB: 32, seed: 5 });
    bootFully(guest);
    expectNothingOverrun(guest);
  });

  it.skipIf(readGuestModule() === undefined)('with its module (needs npm run binaries)', () => {
    const guest = new SteppedGuest({
      vcpus: 8,
      memoryMB: 32,
      seed: 6,
      text: lexerText(6, LEXER_PIECE_BYTES),
    });
    bootFully(guest);
    guest.until(({ lexer }) => lexer !== undefined, 'the end of its text');
    expectNothingOverrun(guest);
  });

  it('elsewhere with another seed, and in the same way with the same', () => {
    const placed = (seed: number) => {
      const { machine, loaded } = new SteppedGuest({ seed, vcpus: 1 });
      machine.step(0, 50_000);
      const { rip, rsp, cr3 } = machine.registers(0);
      return [loaded.kernelBase, loaded.directoryTable, rip - loaded.kernelBase, rsp, cr3].map(String);
    };
    const [first, again, other] = [placed(1), placed(1), placed(2)];
    expect(again).toEqual(first);
    expect(other[0]).not.toBe(first[0]);
    expect(other[1]).not.toBe(first[1]);
  });

  it('only in enough memory: what is too little is said, what is enough boots', () => {
    const { image, hal } = readGuestArtefacts();
    const outcomes = new Set<string>();
    for (let pages = 1; pages <= 256; pages = Math.ceil(pages * 1.25)) {
      const machine = createMachine({ vcpus: 1, memoryBytes: pages * PAGE_SIZE });
      try {
        const loaded = loadGuest(machine, { image, hal, seed: pages });
        machine.step(0, 200_000);
        expect(readGuestReport(machine, loaded)).toBeDefined();
        outcomes.add('boots');
      } catch (error) {
        expect(error).toMatchObject({ code: 'INVALID_ARGUMENT', message: expect.stringContaining('memory') });
        outcomes.add('refused');
      } finally {
        machine.close();
      }
    }
    expect([...outcomes]).toEqual(['refused', 'boots']);
  });

  it.each([-1, 2 ** 32, 1.5, Number.NaN])('not with %d as its seed', (seed) => {
    expect(() => new SteppedGuest({ seed })).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
  });

  it.each([
    ['cut off in its headers', (image: Buffer) => image.subarray(0, 0x100)],
    ['cut off in its sections', (image: Buffer) => image.subarray(0, 0x3000)],
    ['of another kind', (image: Buffer) => Buffer.from(image).fill(0, 0x80, 0xa0)],
  ])('not from an image %s', (_what, damage) => {
    const machine = createMachine({ vcpus: 1, memoryBytes: 16 << 20 });
    try {
      const { image: whole, hal } = readGuestArtefacts();
      const image = damage(whole);
      expect(() => loadGuest(machine, { image, hal, seed: 1 })).toThrow(
        expect.objectContaining({ code: 'IMAGE_INVALID' }),
      );
    } finally {
      machine.close();
    }
  });
});

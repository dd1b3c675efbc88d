import { describe, expect, it } from 'vitest';
import { KernelImage } from '../../src/nt/kernel-image.js';
import { PeImage } from '../../src/nt/pe.js';
import { SlackOfImages } from '../../src/slack/slack-of-images.js';
import type { Gva } from '../../src/vmi/address.js';
import type { GuestMemory } from '../../src/vmi/guest-memory.js';
import { buildPe, FLAGS } from '../nt/pe-builder.js';

const NT_BASE = 0xffff_f804_0000_0000n;
const GIGABYTE = 1n << 30n;

/** An image with one page of code, of which this many bytes are slack. */
function image(name: string, base: Gva, slack: number): KernelImage {
  const bytes = Buffer.alloc(0x1000 - slack, 0xc3);
  const pe = PeImage.fromFile(
    buildPe({ sections: [{ name: '.text', rva: 0x1000, flags: FLAGS.code, bytes }] }),
  );
  return new KernelImage(name, base, pe, new Set());
}

const nt = image('nt', NT_BASE, 100);
const exhausted = expect.objectContaining({ code: 'SLACK_EXHAUSTED' });

/** Memory in which only the images' code is not zero, and what is `missing` is not mapped. */
function slackOf(missing?: KernelImage, ...permanent: KernelImage[]): SlackOfImages {
  const memory = {
    readIfMapped: (gva: Gva, length: number) => (missing?.contains(gva) ? undefined : Buffer.alloc(length)),
  } as Partial<GuestMemory> as GuestMemory;
  return new SlackOfImages([nt, ...permanent], memory);
}

describe('the slack of images', () => {
  it("a module's code leads to NT's first, and to the module's own when that is used up", () => {
    const near = image('a.sys', NT_BASE + GIGABYTE, 200);
    const all = slackOf();
    const slack = all.for(near);
    expect(slack.freeBytes).toBe(300);
    expect(nt.contains(slack.allocate(80).gva)).toBe(true);
    const own = slack.allocate(80);
    expect(near.contains(own.gva)).toBe(true);
    expect(all.usage([nt, near])).toEqual({ bytes: 300, free: 140 });
    all.free(own);
    expect(all.usage([nt, near])).toEqual({ bytes: 300, free: 220 });
    expect(() => slack.allocate(201)).toThrow(exhausted);
  });

  it('the last resort is that of modules which are never unloaded', () => {
    const [own, permanent] = [
      image('a.sys', NT_BASE + GIGABYTE, 200),
      image('ci.dll', NT_BASE + 0x10_0000n, 300),
    ];
    const all = slackOf(undefined, permanent);
    const slack = all.for(own);
    const places = [80, 180, 280].map((size) => slack.allocate(size).gva);
    expect([nt, own, permanent].map((each, index) => each.contains(places[index]!))).toEqual([
      true,
      true,
      true,
    ]);
    expect(permanent.contains(all.for(nt).allocate(20).gva)).toBe(false);
    expect(all.for(nt).freeBytes).toBe(20);
    const far = image('far.sys', NT_BASE + 4n * GIGABYTE, 50);
    expect(all.for(far).freeBytes).toBe(50);
  });

  it("NT's code leads to no module's, and no module's to another one's", () => {
    const [one, other] = [image('a.sys', NT_BASE + GIGABYTE, 200), image('b.sys', NT_BASE + 0x10_0000n, 300)];
    const all = slackOf();
    expect(all.for(other).freeBytes).toBe(400);
    expect(all.for(one).freeBytes).toBe(300);
    expect(() => all.for(nt).allocate(101)).toThrow(exhausted);
    expect(() => all.for(one).allocate(250)).toThrow(exhausted);
  });

  it.each([
    ['the last one in reach', 2n * GIGABYTE - 0x2000n, 300],
    ['one page further', 2n * GIGABYTE - 0x1000n, 200],
    ['the last one in reach below', 0x2000n - 2n * GIGABYTE, 300],
    ['one page further below', 0x1000n - 2n * GIGABYTE, 200],
  ])("NT's is used only where all of it can be reached from all of the module: %s", (_, distance, free) => {
    expect(slackOf().for(image('a.sys', NT_BASE + distance, 200)).freeBytes).toBe(free);
  });

  it('a module that has gone meanwhile has none', () => {
    const gone = image('a.sys', NT_BASE + GIGABYTE, 200);
    expect(slackOf(gone).for(gone).freeBytes).toBe(100);
  });

  it('a block is freed once, and only a block of its own', () => {
    const all = slackOf();
    const block = all.for(nt).allocate(10);
    const invalid = expect.objectContaining({ code: 'INVALID_ARGUMENT' });
    expect(() => all.free({ ...block })).toThrow(invalid);
    all.free(block);
    expect(() => all.free(block)).toThrow(invalid);
  });
});

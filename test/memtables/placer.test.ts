import { expect, test } from 'vitest';
import type { HandlerLayout } from '../../src/handlers/plan.js';
import { Placer } from '../../src/memtables/placer.js';
import { SlackAllocator } from '../../src/slack/allocator.js';

const SLACK = { section: '.text', gva: 0x1000n, size: 0x100 };

function setUp() {
  const slack = new SlackAllocator([SLACK], (_, length) => new Uint8Array(length));
  return { slack, placer: new Placer(slack) };
}

/** A handler that cannot be placed from some address on. */
function layoutOf(size: number, outOfRangeFrom = 0x2000n): HandlerLayout {
  const at = (handler: bigint) =>
    handler < outOfRangeFrom
      ? ({ handler: { gva: handler, bytes: Buffer.alloc(size) } } as ReturnType<HandlerLayout['at']>)
      : ({ refused: 'jump-out-of-range' } as const);
  return { size, replaces: [BigInt(size)], at };
}

test('handlers get blocks of their own, each at the place it is laid out for', () => {
  const { slack, placer } = setUp();
  const placed = placer.place([layoutOf(0x30), layoutOf(0x40)]);
  expect(placed).toMatchObject([
    { replaces: [0x30n], slack: { gva: 0x1000n, size: 0x30 }, plan: { handler: { gva: 0x1000n } } },
    { replaces: [0x40n], slack: { gva: 0x1030n, size: 0x40 }, plan: { handler: { gva: 0x1030n } } },
  ]);
  expect(slack.freeBytes).toBe(0x90);
  placer.release(placed as Exclude<typeof placed, string>);
  expect(slack.freeBytes).toBe(0x100);
});

test('where one of several finds no room, or none in reach, the others give theirs back', () => {
  const { slack, placer } = setUp();
  expect(placer.place([layoutOf(0x80), layoutOf(0x81)])).toBe('no-slack');
  expect(slack.freeBytes).toBe(0x100);
  expect(placer.place([layoutOf(0x80), layoutOf(0x40, 0x1080n)])).toBe('jump-out-of-range');
  expect(slack.freeBytes).toBe(0x100);
});

test('slack that cannot be read is no reason to keep any', () => {
  let reads = 0;
  const slack = new SlackAllocator([SLACK], (_, length) => {
    if (++reads === 2) throw new Error('gone');
    return new Uint8Array(length);
  });
  expect(() => new Placer(slack).place([layoutOf(0x20), layoutOf(0x30)])).toThrow('gone');
  // What could not be looked at is lost, the other block is not.
  expect(slack.freeBytes).toBeGreaterThanOrEqual(0x100 - 0x30);
});

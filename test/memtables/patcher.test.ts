import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { changesLeft } from '../../src/journal/journal.js';
import { CROSSING, GVA, twoPageGuest } from './two-page-guest.js';

describe('patcher', () => {
  test('a patch across a page edge goes to both frames, is trapped on both, and reads as before', () => {
    const { memory, trapped, journal, patcher, apply } = twoPageGuest();
    const before = Buffer.from(memory);
    const applied = apply('x', CROSSING);
    expect(memory.subarray(0x2ffd, 0x3000).toString('hex')).toBe('e91122');
    expect(memory.subarray(0x1000, 0x1002).toString('hex')).toBe('3344');
    expect([...trapped].sort()).toEqual([1n, 2n]);
    expect(patcher.readOriginal(GVA + 0xff0n, 0x20)).toEqual(
      Buffer.concat([before.subarray(0x2ff0, 0x3000), before.subarray(0x1000, 0x1010)]),
    );
    patcher.revert(applied);
    expect(memory).toEqual(before);
    expect([...trapped]).toEqual([]);
    expect(journal.outstanding).toBe(0);
  });

  test('whichever call fails half way, a revert leaves the guest byte-identical, nothing trapped or journalled', () => {
    let failures = 0;
    for (let n = 1; ; n++) {
      const { memory, trapped, journal, cloaks, failing, patcher } = twoPageGuest();
      const before = Buffer.from(memory);
      const change = patcher.prepare('x', CROSSING);
      failing.failAt(n);
      let error: unknown;
      try {
        patcher.apply(change);
      } catch (thrown) {
        error = thrown;
      }
      if (error === undefined) break;
      failures++;
      expect(error).toMatchObject({ code: 'HYPERVISOR_FAILED' });
      patcher.revert(change);
      expect(memory).toEqual(before);
      expect([...trapped]).toEqual([]);
      expect(cloaks.frames()).toEqual([]);
      expect(journal.outstanding).toBe(0);
    }
    // Reads, translations, a trap and a write for each of the two pages.
    expect(failures).toBeGreaterThanOrEqual(8);
  });

  test('a revert that failed half way succeeds the second time, and no frame stays trapped', () => {
    let failures = 0;
    for (let n = 1; ; n++) {
      const { memory, trapped, journal, cloaks, failing, patcher, apply } = twoPageGuest();
      const before = Buffer.from(memory);
      const applied = apply('x', CROSSING);
      failing.failAt(n);
      let error: unknown;
      try {
        patcher.revert(applied);
      } catch (thrown) {
        error = thrown;
      }
      if (error === undefined) break;
      failures++;
      expect(error).toMatchObject({ code: 'HYPERVISOR_FAILED' });
      patcher.revert(applied);
      expect(memory).toEqual(before);
      expect([...trapped]).toEqual([]);
      expect(cloaks.frames()).toEqual([]);
      expect(journal.outstanding).toBe(0);
    }
    // A write and a release for each of the two pages.
    expect(failures).toBe(4);
  });

  test('what was decoded at changed bytes is forgotten when they change and when they change back', () => {
    const { instructions, patcher, apply } = twoPageGuest();
    const decode = (bytes: number[]) => instructions.lookup(GVA, () => Uint8Array.from(bytes)).length;
    expect(decode([0x8b, 0xc1])).toBe(2);
    const applied = apply('x', { gva: GVA + 1n, bytes: Buffer.alloc(5, 0x90) });
    expect(decode([0xe9, 1, 2, 3, 4])).toBe(5);
    patcher.revert(applied);
    expect(decode([0x8b, 0xc1])).toBe(2);
  });

  test('a page keeps its trap while another patch on it is hidden', () => {
    const { trapped, patcher, apply } = twoPageGuest();
    const first = apply('a', { gva: GVA, bytes: Buffer.alloc(4, 1) });
    const second = apply('b', { gva: GVA + 8n, bytes: Buffer.alloc(4, 2) });
    patcher.revert(first);
    expect([...trapped]).toEqual([2n]);
    patcher.revert(second);
    expect([...trapped]).toEqual([]);
  });

  test('what the guest wrote over a patch is what a revert leaves', () => {
    const { memory, journal, patcher, apply } = twoPageGuest();
    const applied = apply('x', { gva: GVA, bytes: Buffer.from([0xe9, 1, 2, 3, 4]) });
    memory[0x2001] = 0x77;
    expect(patcher.reconcile(0x2001n, 1)).toEqual([applied]);
    expect(patcher.readOriginal(GVA, 5)![1]).toBe(0x77);
    const original = Array.from({ length: 5 }, (_, i) => (0x2000 + i) % 251);
    original[1] = 0x77;
    patcher.revert(applied);
    expect([...memory.subarray(0x2000, 0x2005)]).toEqual(original);
    expect(journal.outstanding).toBe(0);
  });

  /** A patch on two pages, of each of which the guest has written over a byte. */
  function overwritten() {
    const guest = twoPageGuest();
    const applied = guest.apply('x', CROSSING);
    for (const gpa of [0x2ffe, 0x1001]) {
      guest.memory[gpa] = 0x77;
      guest.patcher.reconcile(BigInt(gpa), 1);
    }
    const inMemory = () =>
      Buffer.concat([guest.memory.subarray(0x2ffd, 0x3000), guest.memory.subarray(0x1000, 0x1002)]);
    return { ...guest, applied, inMemory };
  }

  test('a patch that the guest has written over is whole when asserted again, and what it wrote is what a revert leaves', () => {
    const { journal, journalPath, instructions, patcher, applied, inMemory } = overwritten();
    const decode = (bytes: number[]) =>
      instructions.lookup(CROSSING.gva, () => Uint8Array.from(bytes)).length;
    expect(decode([0x8b, 0xc1])).toBe(2);
    patcher.reassert(applied);
    expect(inMemory()).toEqual(CROSSING.bytes);
    expect(decode([0xe9, 1, 2, 3, 4])).toBe(5);
    expect(changesLeft(journalPath)).toHaveLength(2);
    const last = readFileSync(journalPath, 'utf8').trimEnd().split('\n').slice(-4);
    expect(last.map((line) => JSON.parse(line)).filter(({ type }) => type === 'write')).toMatchObject([
      { after: 'e91122' },
      { after: '3344' },
    ]);
    const seen = patcher.readOriginal(CROSSING.gva, CROSSING.bytes.length)!;
    expect([seen[1], seen[4]]).toEqual([0x77, 0x77]);
    patcher.revert(applied);
    expect(inMemory()).toEqual(seen);
    expect(journal.outstanding).toBe(0);
  });

  test('where asserting a patch again fails half way, the guest still sees what it wrote, and a revert leaves that', () => {
    for (let n = 1; n <= 2; n++) {
      const { journal, journalPath, failing, patcher, applied, inMemory } = overwritten();
      failing.failAtChange(n);
      expect(() => patcher.reassert(applied)).toThrow(expect.objectContaining({ code: 'HYPERVISOR_FAILED' }));
      const seen = patcher.readOriginal(CROSSING.gva, CROSSING.bytes.length)!;
      expect([seen[1], seen[4]]).toEqual([0x77, 0x77]);
      expect(patcher.isInPlace(applied)).toBe(true);
      expect(changesLeft(journalPath)).toHaveLength(2);
      patcher.revert(applied);
      expect(inMemory()).toEqual(seen);
      expect(journal.outstanding).toBe(0);
    }
  });

  test('a patch is wholly overwritten only when no byte of it is left', () => {
    const { memory, patcher, applied } = overwritten();
    expect(patcher.isWhollyOverwritten(applied)).toBe(false);
    memory.fill(0x78, 0x2ffd, 0x3000);
    patcher.reconcile(0x2ffdn, 3);
    expect(patcher.isWhollyOverwritten(applied)).toBe(false);
    memory.fill(0x78, 0x1000, 0x1002);
    patcher.reconcile(0x1000n, 2);
    expect(patcher.isWhollyOverwritten(applied)).toBe(true);
  });

  test('after writes that are not known, every hidden byte is compared', () => {
    const { memory, patcher, apply } = twoPageGuest();
    const first = apply('a', { gva: GVA, bytes: Buffer.alloc(5, 1) });
    const second = apply('b', CROSSING);
    apply('c', { gva: GVA + 0x100n, bytes: Buffer.alloc(5, 3) });
    memory[0x2002] = 0x77;
    memory[0x1001] = 0x78;
    expect(new Set(patcher.reconcileAll())).toEqual(new Set([first, second]));
    expect(patcher.readOriginal(GVA + 2n, 1)).toEqual(Buffer.from([0x77]));
    expect(patcher.readOriginal(GVA + 0x1001n, 1)).toEqual(Buffer.from([0x78]));
  });

  test('what is not mapped has no original bytes', () => {
    const { patcher } = twoPageGuest();
    expect(patcher.readOriginal(GVA + 0x1ff0n, 0x20)).toBeUndefined();
  });
});

describe('a change whose code the guest has unloaded', () => {
  /** A patch on both pages, 0x20 bytes on each; every second one is zero. */
  const both = { gva: GVA + 0xfe0n, bytes: Buffer.alloc(0x40, 'cc00', 'hex') };

  test('is in place until a page is mapped to another frame, or to none', () => {
    const { remap, patcher, apply } = twoPageGuest();
    const change = apply('x', both);
    expect(patcher.isInPlace(change)).toBe(true);
    const undo = remap(1, 0x3000n);
    expect(patcher.isInPlace(change)).toBe(false);
    undo();
    expect(patcher.isInPlace(change)).toBe(true);
    remap(0, undefined);
    expect(patcher.isInPlace(change)).toBe(false);
  });

  test('is taken out of frames that nobody has used since, and others stay as they are', () => {
    const { memory, trapped, journal, remap, patcher, apply } = twoPageGuest();
    const before = Buffer.from(memory);
    const change = apply('x', both);
    remap(0, undefined);
    remap(1, undefined);
    memory[0x1010] = 0x5a;
    expect(patcher.isInPlace(change)).toBe(false);
    const second = Buffer.from(memory.subarray(0x1000, 0x1020));
    patcher.revertUntouched(change);
    second.copy(before, 0x1000);
    expect(memory).toEqual(before);
    expect([[...trapped], journal.outstanding]).toEqual([[], 0]);
  });

  test('is taken out of frames that the guest was seen to write to, but that are as we left them since', () => {
    const { memory, remap, patcher, apply } = twoPageGuest();
    const change = apply('x', both);
    memory[0x2fe1] = 0x77;
    patcher.reconcile(0x2fe1n, 1);
    patcher.reassert(change);
    remap(0, undefined);
    patcher.revertUntouched(change);
    const original = Buffer.from(Array.from({ length: 0x20 }, (_, i) => (0x2fe0 + i) % 251));
    original[1] = 0x77;
    expect(memory.subarray(0x2fe0, 0x3000)).toEqual(original);
  });

  test('stays as it is where the guest was seen to write: bytes that it left as they were are its own all the same', () => {
    const { memory, journal, remap, patcher, apply } = twoPageGuest();
    const change = apply('x', both);
    remap(0, undefined);
    memory.fill(0, 0x2000, 0x3000);
    patcher.reconcile(0x2fe0n, undefined);
    patcher.revertUntouched(change);
    expect(memory.subarray(0x2000, 0x3000)).toEqual(Buffer.alloc(0x1000));
    expect(journal.outstanding).toBe(0);
  });
});

import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { CloakMap } from '../../src/cloak/cloak-map.js';
import { Journal } from '../../src/journal/journal.js';
import { type AppliedPatch, Patcher } from '../../src/memtables/patcher.js';
import { GuestMemory } from '../../src/vmi/guest-memory.js';
import type { Hypervisor } from '../../src/vmi/hypervisor.js';
import { InstructionCache } from '../../src/x86/instruction-cache.js';
import { failingHypervisor } from '../support/failing-hypervisor.js';

/** Two pages of guest memory, neighbours by GVA, swapped by GPA. */
const GVA = 0xffff_f800_0000_1000n;
const PAGES = [0x2000n, 0x1000n];
/** Crosses from the first page to the second. */
const CROSSING = { gva: GVA + 0xffdn, bytes: Buffer.from('e911223344', 'hex') };

function fakeHypervisor() {
  const memory = Buffer.from(Array.from({ length: 0x4000 }, (_, i) => i % 251));
  const trapped = new Set<bigint>();
  const hypervisor = {
    readPhysical: (gpa: bigint, length: number) => memory.subarray(Number(gpa), Number(gpa) + length),
    writePhysical: (gpa: bigint, bytes: Uint8Array) => void memory.set(bytes, Number(gpa)),
    translate: (_: bigint, gva: bigint) => {
      const page = PAGES[Number((gva - GVA) >> 12n)];
      return page === undefined ? undefined : page + (gva & 0xfffn);
    },
    trapAccess: (gfn: bigint) => void trapped.add(gfn),
    releaseAccess: (gfn: bigint) => void trapped.delete(gfn),
  } as Partial<Hypervisor> as Hypervisor;
  return { memory, trapped, hypervisor };
}

let directory: string;
let journal: Journal;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'patcher-'));
  journal = Journal.create(join(directory, 'journal'), { guest: 'vm', kernelBase: 0n, pdb: 'x' }, () => true);
});
afterEach(() => rmSync(directory, { recursive: true }));

function setUp() {
  const guest = fakeHypervisor();
  const failing = failingHypervisor(guest.hypervisor);
  const cloaks = new CloakMap<AppliedPatch>();
  const instructions = new InstructionCache();
  const memory = new GuestMemory(failing.hypervisor, 0n);
  const patcher = new Patcher(failing.hypervisor, memory, journal, cloaks, instructions);
  return { ...guest, failing, cloaks, instructions, patcher };
}

describe('patcher', () => {
  test('a patch across a page edge goes to both frames, is trapped on both, and reads as before', () => {
    const { memory, trapped, patcher } = setUp();
    const before = Buffer.from(memory);
    const applied = patcher.apply('x', CROSSING);
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

  test('whichever call fails half way, the guest is byte-identical and nothing stays trapped or journalled', () => {
    let failures = 0;
    for (let n = 1; ; n++) {
      const { memory, trapped, cloaks, failing, patcher } = setUp();
      const before = Buffer.from(memory);
      failing.failAt(n);
      let error: unknown;
      try {
        patcher.apply('x', CROSSING);
      } catch (thrown) {
        error = thrown;
      }
      if (error === undefined) break;
      failures++;
      expect(error).toMatchObject({ code: 'HYPERVISOR_FAILED' });
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
      const { memory, trapped, cloaks, failing, patcher } = setUp();
      const before = Buffer.from(memory);
      const applied = patcher.apply('x', CROSSING);
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
    const { instructions, patcher } = setUp();
    const decode = (bytes: number[]) => instructions.lookup(GVA, () => Uint8Array.from(bytes)).length;
    expect(decode([0x8b, 0xc1])).toBe(2);
    const applied = patcher.apply('x', { gva: GVA + 1n, bytes: Buffer.alloc(5, 0x90) });
    expect(decode([0xe9, 1, 2, 3, 4])).toBe(5);
    patcher.revert(applied);
    expect(decode([0x8b, 0xc1])).toBe(2);
  });

  test('a page keeps its trap while another patch on it is hidden', () => {
    const { trapped, patcher } = setUp();
    const first = patcher.apply('a', { gva: GVA, bytes: Buffer.alloc(4, 1) });
    const second = patcher.apply('b', { gva: GVA + 8n, bytes: Buffer.alloc(4, 2) });
    patcher.revert(first);
    expect([...trapped]).toEqual([2n]);
    patcher.revert(second);
    expect([...trapped]).toEqual([]);
  });

  test('what the guest wrote over a patch is what a revert leaves', () => {
    const { memory, patcher } = setUp();
    const applied = patcher.apply('x', { gva: GVA, bytes: Buffer.from([0xe9, 1, 2, 3, 4]) });
    memory[0x2001] = 0x77;
    expect(patcher.reconcile(0x2001n, 1)).toEqual([applied]);
    expect(patcher.readOriginal(GVA, 5)[1]).toBe(0x77);
    const original = Array.from({ length: 5 }, (_, i) => (0x2000 + i) % 251);
    original[1] = 0x77;
    patcher.revert(applied);
    expect([...memory.subarray(0x2000, 0x2005)]).toEqual(original);
    expect(journal.outstanding).toBe(0);
  });

  test('a patch that could not be taken back says so and stays in the journal', () => {
    const { hypervisor } = fakeHypervisor();
    hypervisor.writePhysical = () => {
      throw new Error('gone');
    };
    const memory = new GuestMemory(hypervisor, 0n);
    const patcher = new Patcher(hypervisor, memory, journal, new CloakMap(), new InstructionCache());
    expect(() => patcher.apply('x', CROSSING)).toThrow(expect.objectContaining({ code: 'ROLLBACK_FAILED' }));
    expect(journal.outstanding).toBeGreaterThan(0);
  });
});

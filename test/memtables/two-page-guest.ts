import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { onTestFinished } from 'vitest';
import { CloakMap } from '../../src/cloak/cloak-map.js';
import type { Patch } from '../../src/handlers/plan.js';
import { Journal } from '../../src/journal/journal.js';
import { type CodeChange, Patcher } from '../../src/memtables/patcher.js';
import { GuestMemory } from '../../src/vmi/guest-memory.js';
import type { Hypervisor } from '../../src/vmi/hypervisor.js';
import { InstructionCache } from '../../src/x86/instruction-cache.js';
import { failingHypervisor } from '../support/failing-hypervisor.js';

/** Two pages of guest memory, neighbours by GVA, swapped by GPA. */
export const GVA = 0xffff_f800_0000_1000n;
const PAGES: readonly (bigint | undefined)[] = [0x2000n, 0x1000n];
/** Crosses from the first page to the second. */
export const CROSSING = { gva: GVA + 0xffdn, bytes: Buffer.from('e911223344', 'hex') };

/** A patcher on a guest of two pages, on a hypervisor that fails when it is told to. */
export function twoPageGuest() {
  const memory = Buffer.from(Array.from({ length: 0x4000 }, (_, i) => i % 251));
  const trapped = new Set<bigint>();
  const pages = [...PAGES];
  const hypervisor = {
    readPhysical: (gpa: bigint, length: number) => memory.subarray(Number(gpa), Number(gpa) + length),
    writePhysical: (gpa: bigint, bytes: Uint8Array) => void memory.set(bytes, Number(gpa)),
    translate: (_: bigint, gva: bigint) => {
      const page = pages[Number((gva - GVA) >> 12n)];
      return page === undefined ? undefined : page + (gva & 0xfffn);
    },
    trapAccess: (gfn: bigint) => void trapped.add(gfn),
    releaseAccess: (gfn: bigint) => void trapped.delete(gfn),
  } as Partial<Hypervisor> as Hypervisor;
  const failing = failingHypervisor(hypervisor);
  const directory = mkdtempSync(join(tmpdir(), 'patcher-'));
  onTestFinished(() => rmSync(directory, { recursive: true }));
  const identity = { guest: 'vm', kernelBase: 0n, pdb: 'x' };
  const journalPath = join(directory, 'journal');
  const journal = Journal.create(journalPath, identity, () => true);
  const cloaks = new CloakMap<CodeChange>();
  const instructions = new InstructionCache();
  const patcher = new Patcher(
    failing.hypervisor,
    new GuestMemory(failing.hypervisor, 0n),
    journal,
    cloaks,
    instructions,
  );
  const apply = (label: string, patch: Patch) => {
    const change = patcher.prepare(label, patch);
    patcher.apply(change);
    return change;
  };
  /** Maps a page to another frame, or to none; returns how to undo it. */
  const remap = (page: number, gpa: bigint | undefined) => {
    pages[page] = gpa;
    return () => {
      pages[page] = PAGES[page];
    };
  };
  return { memory, trapped, remap, failing, journal, journalPath, cloaks, instructions, patcher, apply };
}

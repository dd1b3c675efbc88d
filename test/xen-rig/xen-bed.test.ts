import { expect, test } from 'vitest';
import type { Attachment } from '../../src/attachment/attachment.js';
import { MemtablesError } from '../../src/errors.js';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import type { LoadedGuest } from '../../src/guest/loader.js';
import type { LoadCounts } from '../../src/memtables/report.js';
import { hex } from '../../src/vmi/address.js';
import { XenBed } from '../../src/xen-rig/xen-bed.js';

const BASE = 0xfffff80000000000n;
const VCPUS = 2;
const artefacts = readGuestArtefacts();
const site = artefacts.sites.sites.find(({ form }) => form === 'two-level')!;
const guest = {
  kernelBase: BASE,
  vcpuCount: VCPUS,
  bootBlock: 0n,
  translate: () => 0n,
} as unknown as LoadedGuest;
/** The guest has not booted: its boot block names no report. */
const memory = { readPhysical: (_gpa: bigint, length: number) => Buffer.alloc(length) };

/** A bed, and an attachment that answers with each of these in turn, then is gone. */
function setUp(...answers: readonly (readonly LoadCounts[])[]) {
  const left = [...answers];
  const loads = async () => {
    const answer = left.shift();
    if (answer !== undefined) return answer;
    throw new MemtablesError('NOT_ATTACHED', 'unloaded', { remedy: 'Attach again.' });
  };
  return {
    bed: new XenBed('guest', memory, guest, artefacts),
    attachment: { loads } as unknown as Attachment,
  };
}

const counts = (rva: number, hits: number, stale: number): LoadCounts => ({
  site: BASE + BigInt(rva),
  table: BASE,
  hits,
  stale,
});

test('both loads of a switch are known by the names and forms that the guest lists them under', async () => {
  const { bed, attachment } = setUp([counts(site.loadRva, 7, 0), counts(site.byteLoadRva!, 9, 1)]);
  const { violations } = await bed.statistics(attachment);
  const { name, form, expected } = site;
  expect(violations.sites).toEqual([
    {
      site: name,
      form,
      expected,
      load: 'dword',
      rip: hex(BASE + BigInt(site.loadRva)),
      violations: 7,
      stale: 0,
    },
    {
      site: name,
      form,
      expected,
      load: 'byte',
      rip: hex(BASE + BigInt(site.byteLoadRva!)),
      violations: 10,
      stale: 1,
    },
  ]);
});

test('of the violations after a relocation only one a vCPU can have been under way: the others are late', async () => {
  const { bed, attachment } = setUp([counts(site.loadRva, 7, 5)]);
  const [load] = (await bed.statistics(attachment)).violations.sites;
  expect(load).toMatchObject({ violations: 12, stale: VCPUS });
});

test('a load that the guest does not list is left out', async () => {
  const { bed, attachment } = setUp([counts(1, 7, 0)]);
  expect((await bed.statistics(attachment)).violations.sites).toEqual([]);
});

test('after the unload what had trapped by then is still known', async () => {
  const { bed, attachment } = setUp([counts(site.loadRva, 7, 0)]);
  const before = await bed.statistics(attachment);
  expect((await bed.statistics(attachment)).violations).toEqual(before.violations);
});

import { describe, expect, it } from 'vitest';
import { readGuestArtefacts, type SwitchSite } from '../../src/guest/artefacts.js';
import { predictChecksum, WorkloadModel } from '../../src/guest/workload-model.js';
import { SteppedGuest } from './stepped-guest.js';

const { sites, calls } = readGuestArtefacts().sites;

/** Streams whose published checksum is not what the model says. */
function wrongStreams(guest: SteppedGuest) {
  return guest
    .report()
    .streams.filter(
      ({ form, seed, count, checksum }) => predictChecksum(calls, form, seed, count) !== checksum,
    );
}

describe('the model of the workload', () => {
  it.each([
    [1, [0, 1, 2, 0x7fffffff, 0x80000000, 0xffffffff]],
    [2, [3, 0xdeadbeef]],
    [4, [4]],
    [8, [5]],
  ])('predicts every stream on %i vCPUs', (vcpus, seeds) => {
    for (const seed of seeds) {
      const guest = new SteppedGuest({ vcpus, seed });
      guest.until(
        ({ streams }) => streams.length === 3 * vcpus + 1 && streams.every(({ count }) => count > 25n),
        'some switches of each stream',
      );
      expect(wrongStreams(guest), `seed ${seed}`).toEqual([]);
    }
  });

  it('gives streams that differ, with another seed too', () => {
    const seedsOf = (seed: number) => {
      const guest = new SteppedGuest({ vcpus: 4, seed });
      guest.until(({ streams }) => streams.length === 13, 'its streams');
      return guest.report().streams.map((stream) => stream.seed);
    };
    const all = [...seedsOf(10), ...seedsOf(11)];
    expect(new Set(all).size).toBe(26);
    expect(all.includes(0)).toBe(false);
  });

  it('goes on from where it was', () => {
    const model = new WorkloadModel(calls, 'two-level', 77);
    for (const count of [0n, 1n, 63n, 64n, 500n]) {
      expect(model.checksumAfter(count)).toBe(predictChecksum(calls, 'two-level', 77, count));
    }
  });

  it('lets a value past every end through, so that each default case runs', () => {
    // Where no guard is, there is none for a value past the end.
    const { sites } = readGuestArtefacts().sites;
    const unguarded = new Set(sites.filter(({ guard }) => guard === 'none').map((site) => site.function));
    for (const { function: name, form, range, switches } of calls) {
      if (form === 'look-alike' || unguarded.has(name)) continue;
      const [model] = switches;
      if (model!.mask !== 0) continue;
      expect((range - 1) >> (switches.length - 1)).toBeGreaterThanOrEqual(
        model!.byteEntries || model!.entries,
      );
    }
  });
});

describe('a table entry that is wrong', () => {
  const WIDTH = 4;

  /** Makes one entry lead to another case; or to the next one, where the table has but one. */
  function corrupt(guest: SteppedGuest, site: SwitchSite): void {
    const table = guest.loaded.kernelBase + BigInt(site.tableRva);
    const entries = guest.read(table, site.entries * WIDTH);
    const first = entries.readUInt32LE(0);
    const others = Array.from({ length: site.entries }, (_, index) => entries.readUInt32LE(index * WIDTH));
    const other = others.find((entry) => entry !== 0 && entry !== first) ?? first + bodyBytes(guest, first);
    for (let index = 0; index < site.entries; index++) {
      if (entries.readUInt32LE(index * WIDTH) === first) entries.writeUInt32LE(other, index * WIDTH);
    }
    guest.write(table, entries);
  }

  /** Case bodies end with RET; the next one is another case, or the default. */
  function bodyBytes(guest: SteppedGuest, rva: number): number {
    return guest.read(guest.loaded.kernelBase + BigInt(rva), 64).indexOf(0xc3) + 1;
  }

  it.each([
    'NtCreateFile',
    'ExFreePoolWithTag',
    'ExAllocatePoolWithTag',
    'NtQueryKey',
    'NtWriteFile',
    'KdChangeOption',
  ])('makes a checksum wrong, and only of its form: %s', (name) => {
    const site = sites.find((each) => each.name === name)!;
    const guest = new SteppedGuest({ vcpus: 1, seed: 99 });
    guest.until(({ streams }) => streams.some(({ count }) => count > 0n), 'a first switch');
    expect(wrongStreams(guest)).toEqual([]);
    corrupt(guest, site);
    guest.until(() => wrongStreams(guest).length > 0, 'a wrong checksum');
    expect(new Set(wrongStreams(guest).map(({ form }) => form))).toEqual(new Set([site.form]));
  });
});

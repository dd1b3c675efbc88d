import { describe, expect, it } from 'vitest';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import { ExportTable } from '../../src/nt/exports.js';
import { KernelImages } from '../../src/nt/kernel-images.js';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage } from '../../src/nt/pe.js';
import { findSlack } from '../../src/slack/regions.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { SteppedGuest } from './stepped-guest.js';

const artefacts = readGuestArtefacts();
const image = PeImage.fromFile(artefacts.hal);
const exports = ExportTable.read(image);
/** What is left of a page behind the three bytes of the longest function that has a section of its own. */
const LARGEST_HOLES = 4093;
const functions = [...exports.entries()].map(([, rva]) => BigInt(rva));
const MOST_STEPS = 500_000;
const STEPS_PER_TICK = 2000;
/** By native/guest/guest.inc. */
const REPORT_FIRST_MISMATCH = 0x18n;

describe('the HAL of the guest', () => {
  it('has sections that are nearly all slack, a debug record and unwind data', () => {
    const holes = findSlack(0n, image.sections, (gva, size) => image.read(Number(gva), size));
    expect(holes.filter(({ size }) => size >= LARGEST_HOLES)).toHaveLength(4);
    expect(image.pdb()?.name).toBe('hal.pdb');
    expect(FunctionTable.read(image).entryAt(exports.rvaOf('HalDisplayString'))).toBeDefined();
  });

  it('is loaded in reach of NT, and listed behind it, as an image that is never unloaded', () => {
    const guest = EmbeddedGuest.boot({ seed: 31 });
    const kernel = guest.discover();
    const images = new KernelImages(kernel, (gva, length) => kernel.memory.readIfMapped(gva, length));
    const [nt, ...others] = images.permanent();
    expect(nt).toBe(kernel);
    expect(others.map(({ name, base }) => ({ name, base }))).toEqual([
      { name: 'hal.dll', base: guest.loaded.hal.base },
    ]);
    expect(others[0]!.end - nt.base).toBeLessThan(1n << 31n);
  });

  it.each([1, 2, 3])('is what NT calls through its import table, wherever it lies (seed %d)', (seed) => {
    const guest = new SteppedGuest({ seed, vcpus: 2 });
    const { base } = guest.loaded.hal;
    const entered = new Set<bigint>();
    for (let step = 0; step < MOST_STEPS && entered.size < functions.length; step++) {
      for (let vcpu = 0; vcpu < guest.machine.vcpuCount; vcpu++) {
        if (step % STEPS_PER_TICK === 0) guest.tick(vcpu);
        guest.step(vcpu, 1);
        const { rip } = guest.machine.registers(vcpu);
        if (functions.includes(rip - base)) entered.add(rip - base);
      }
    }
    expect([...entered].sort()).toEqual([...functions].sort());
  });

  it('is looked at by the integrity checker: one byte of its slack, and of its code', () => {
    const guest = SteppedGuest.boot({ vcpus: 1, seed: 64 });
    const putCharacter = guest.loaded.hal.base + BigInt(exports.rvaOf('HalPutCharacter'));
    for (const gva of [putCharacter, putCharacter + 4095n]) {
      const [expected] = guest.read(gva, 1);
      guest.write(gva, Uint8Array.of(expected! ^ 4));
      guest.until(({ integrity }) => integrity.firstMismatch?.gva === gva, 'see the change');
      guest.write(gva, Uint8Array.of(expected!));
      guest.write(guest.symbol('WlReport') + REPORT_FIRST_MISMATCH, Buffer.alloc(8));
    }
  });

  it('is part of what must be as before after an unload', () => {
    const guest = EmbeddedGuest.boot({ seed: 32 });
    const before = guest.image();
    const code = guest.loaded.translate(guest.loaded.hal.base + BigInt(exports.rvaOf('HalStartClock')))!;
    guest.machine.writePhysical(code + 100n, Uint8Array.of(1));
    expect(guest.image()).not.toBe(before);
  });
});

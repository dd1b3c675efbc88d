import { describe, expect, test } from 'vitest';
import type { Engine } from '../../src/memtables/engine.js';
import type { EngineEvent } from '../../src/memtables/report.js';
import type { Kernel } from '../../src/nt/kernel.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { hookAll, relocations, serve, workAll } from './relocated-guest.js';

/** A leaf function, inside which the profile may name any place as a function. */
const LEAF = 'IoAllocateMdl';

function attached(seed: number) {
  const guest = EmbeddedGuest.boot({ seed });
  const attachment = guest.attach({ threshold: 2 });
  const siteOf = (name: string) => guest.artefacts.sites.sites.find((site) => site.name === name)!;
  return { guest, siteOf, ...attachment };
}

/** Makes the profile name this place. */
function nameSymbol({ profile }: Kernel, name: string, rva: number): void {
  const symbol = profile.symbol.bind(profile);
  profile.symbol = (wanted) => (wanted === name ? rva : symbol(wanted));
}

function serveUntilHot(guest: EmbeddedGuest, engine: Engine): void {
  serve(guest.hypervisor, engine, () => engine.statistics().tableLoads > 3000);
}

function refusalOf(events: readonly EngineEvent[], site: bigint): string | undefined {
  const event = events.find((each) => each.type === 'refused' && each.site === site);
  return event?.type === 'refused' ? event.reason : undefined;
}

describe('a load is left where it is', () => {
  test('when its table is not what it was at discovery, on which the proof rests', () => {
    const { guest, siteOf, engine, kernel, events } = attached(71);
    const before = guest.image();
    hookAll(guest, engine);
    serveUntilHot(guest, engine);
    // An entry that no index leads to, so that the guest itself does not mind.
    const { loadRva, tableRva } = siteOf('MmProbeAndLockPages');
    const entry = kernel.memory.translate(kernel.base + BigInt(tableRva + 4));
    guest.machine.writePhysical(entry, Buffer.from([1]));
    engine.relocating = true;
    workAll(engine);
    const site = kernel.base + BigInt(loadRva);
    expect(refusalOf(events, site)).toBe('code-has-changed');
    expect(relocations(events).length).toBeGreaterThan(10);
    expect(relocations(events).some((each) => each.site === site)).toBe(false);
    engine.unload();
    guest.machine.writePhysical(entry, Buffer.from([0]));
    expect(guest.image()).toBe(before);
  });

  test('when its function is not what it was at discovery', () => {
    const { guest, siteOf, engine, kernel, events } = attached(72);
    hookAll(guest, engine);
    serveUntilHot(guest, engine);
    // The constant of the default case: the guest computes something else from now on, nothing more.
    const { loadRva, functionRva } = siteOf('KeSetTimerEx');
    const code = kernel.image.read(functionRva, loadRva - functionRva + 64);
    const constant = Buffer.from(code).lastIndexOf(0x35) + 1;
    const at = kernel.memory.translate(kernel.base + BigInt(functionRva + constant));
    guest.machine.writePhysical(at, Buffer.from([code[constant]! ^ 0xff]));
    engine.relocating = true;
    workAll(engine);
    expect(refusalOf(events, kernel.base + BigInt(loadRva))).toBe('code-has-changed');
    engine.unload();
  });

  test('when a hook has been placed over it since it became hot', () => {
    const { guest, siteOf, engine, kernel, events } = attached(73);
    const before = guest.image();
    const { loadRva } = siteOf(LEAF);
    const site = kernel.base + BigInt(loadRva);
    hookAll(guest, engine);
    serveUntilHot(guest, engine);
    engine.relocating = true;
    nameSymbol(kernel, 'Inside', loadRva);
    engine.hook('nt!Inside');
    workAll(engine);
    expect(refusalOf(events, site)).toBe('overlaps-hook');
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.image()).toBe(before);
  });
});

test('a hook over a relocated load is refused: its handler returns into the bytes to be replaced', () => {
  const { guest, siteOf, engine, kernel, events } = attached(74);
  const { loadRva } = siteOf(LEAF);
  const site = kernel.base + BigInt(loadRva);
  hookAll(guest, engine);
  engine.relocating = true;
  serve(guest.hypervisor, engine, () => relocations(events).some((each) => each.site === site));
  nameSymbol(kernel, 'Inside', loadRva);
  const image = guest.image();
  engine.relocating = false;
  expect(() => engine.hook('nt!Inside')).toThrow(
    expect.objectContaining({ context: expect.objectContaining({ reason: 'overlaps-relocation' }) }),
  );
  expect(guest.image()).toBe(image);
  engine.unload();
  expect(guest.wrongStreams()).toEqual([]);
});

test('two loads of one table are two sites: each is relocated at its own place, to its own handler', () => {
  const { guest, siteOf, engine, kernel, events } = attached(75);
  const sites = ['NtCreateFile', 'NtCreateFile_second'].map(
    (name) => kernel.base + BigInt(siteOf(name).loadRva),
  );
  hookAll(guest, engine);
  engine.relocating = true;
  const done = () => relocations(events).filter(({ site }) => sites.includes(site));
  serve(guest.hypervisor, engine, () => done().length === 2);
  const [first, second] = done();
  expect(first!.table).toBe(second!.table);
  expect(first!.site).not.toBe(second!.site);
  expect(first!.handlers[0]!.gva).not.toBe(second!.handlers[0]!.gva);
  for (const site of sites) {
    const original = Buffer.from(kernel.image.read(Number(site - kernel.base), 5));
    expect(Buffer.from(kernel.memory.read(site, 5))).not.toEqual(original);
  }
  engine.unload();
  expect(guest.wrongStreams()).toEqual([]);
});

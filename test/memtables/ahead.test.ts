import { describe, expect, test } from 'vitest';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import type { EngineEvent } from '../../src/memtables/report.js';
import { gfnOf } from '../../src/vmi/address.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { handlersOf, hookAll, relocations, serve, workAll } from './relocated-guest.js';

function attachedAhead(seed: number) {
  const guest = EmbeddedGuest.boot({ seed });
  const before = guest.image();
  const attached = guest.attach({ ahead: true });
  const { kernel } = attached;
  const gfn = (rva: number) => gfnOf(kernel.memory.translate(kernel.base + BigInt(rva)));
  const isTrapped = (rva: number) => guest.hypervisor.trappedFrames.includes(gfn(rva));
  /** The loads of dwords of the switches that have the first byte of a table on a trapped page. */
  const trapping = () =>
    guest.artefacts.sites.sites
      .filter(({ expected }) => expected === 'relocatable')
      .filter(({ tableRva, byteTableRva }) => isTrapped(tableRva) || isTrapped(byteTableRva ?? tableRva))
      .map(({ loadRva }) => kernel.base + BigInt(loadRva));
  return { guest, before, trapping, ...attached };
}

function planned(events: readonly EngineEvent[]) {
  return events.filter((event) => event.type === 'planned');
}

describe('with --ahead', () => {
  test('every switch with a table on a trapped page is relocated before it has trapped', () => {
    const { guest, before, trapping, engine, events } = attachedAhead(91);
    hookAll(guest, engine);
    expect(relocations(events)).toEqual([]);
    engine.relocating = true;
    guest.hypervisor.advance = () => [];
    workAll(engine);
    const done = new Set(
      events.flatMap((event) =>
        event.type === 'relocated' || (event.type === 'refused' && event.reason === 'no-slack')
          ? [event.site]
          : [],
      ),
    );
    expect(trapping().length).toBeGreaterThan(20);
    expect(trapping().filter((site) => !done.has(site))).toEqual([]);
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    const { sweeps } = guest.report().integrity;
    serve(guest.hypervisor, engine, () => guest.report().integrity.sweeps > sweeps + 1n);
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.report().integrity.mismatches).toBe(0n);
    expect(guest.image()).toBe(before);
  });

  const hooks = readGuestArtefacts().sites.defaultHooks;
  test.each(hooks)(
    'the pages that relocating traps are planned first: no other one is trapped (%s)',
    (name) => {
      const { guest, engine, kernel, events } = attachedAhead(92);
      engine.hook(`nt!${name}`);
      const [hooked, plan] = events;
      expect([hooked, plan]).toMatchObject([{ type: 'hooked' }, { type: 'planned' }]);
      engine.relocating = true;
      workAll(engine);
      expect(relocations(events).length).toBeGreaterThan(0);
      const frameOf = (gva: bigint) => gfnOf(kernel.memory.translate(gva));
      // Where handlers go shows only when they are placed, and is planned then.
      const [first, ...later] = planned(events).map(({ pages }) => new Set(pages.map(frameOf)));
      const ofHandlers = new Set(handlersOf(events).map(({ gva }) => frameOf(gva)));
      for (const gfn of guest.hypervisor.trappedFrames) {
        expect(first!.has(gfn) || (ofHandlers.has(gfn) && later.some((pages) => pages.has(gfn)))).toBe(true);
      }
      engine.unload();
    },
  );

  test('nothing is relocated while relocation is off', () => {
    const { guest, engine, events } = attachedAhead(93);
    hookAll(guest, engine);
    workAll(engine);
    expect(planned(events).length).toBeGreaterThan(0);
    expect(relocations(events)).toEqual([]);
    engine.unload();
  });
});

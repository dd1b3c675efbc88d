import { describe, expect, test } from 'vitest';
import type { Trap } from '../../src/machine/machine.js';
import type { Engine } from '../../src/memtables/engine.js';
import type { EngineEvent } from '../../src/memtables/report.js';
import { scanGuest } from '../../src/safety/scan.js';
import { whileQuiescent } from '../../src/vmi/quiescence.js';
import { inUserMode } from '../../src/x86/registers.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { failingHypervisor } from '../support/failing-hypervisor.js';

type Relocated = Extract<EngineEvent, { type: 'relocated' }>;

/** Lets guest and engine work until `done`, for a bounded number of listens. */
function serve(guest: EmbeddedGuest, engine: Engine, done: () => boolean, listens = 200_000): void {
  for (let i = 0; i < listens; i++) {
    if (done()) return;
    guest.hypervisor.listen(1);
    engine.work();
  }
  throw new Error('this took too long');
}

function relocations(events: readonly EngineEvent[]): Relocated[] {
  return events.filter((event): event is Relocated => event.type === 'relocated');
}

function hookAll(guest: EmbeddedGuest, engine: Engine): void {
  for (const name of guest.artefacts.sites.defaultHooks) engine.hook(`nt!${name}`);
}

/** A guest with every default hook and at least one relocated one-level load that is executed often. */
function relocatedGuest(options: { vcpus?: number; seed?: number } = {}) {
  const guest = EmbeddedGuest.boot(options);
  const before = guest.image();
  const attached = guest.attach({ threshold: 2 });
  hookAll(guest, attached.engine);
  attached.engine.relocating = true;
  serve(guest, attached.engine, () => relocations(attached.events).length >= 10);
  attached.engine.relocating = false;
  guest.stopTimer();
  return { guest, before, ...attached };
}

/** The relocation whose handler holds `rip`. */
function handlerAt(events: readonly EngineEvent[], rip: bigint): Relocated | undefined {
  return relocations(events).find(
    ({ handler, handlerBytes }) => rip >= handler && rip < handler + BigInt(handlerBytes),
  );
}

/** Runs one instruction, answering what it traps. */
function stepOnce(guest: EmbeddedGuest, vcpu: number): void {
  let { trap } = guest.machine.step(vcpu, 1);
  while (trap !== undefined) {
    guest.hypervisor.deliver([trap]);
    guest.hypervisor.listen(0);
    ({ trap } = guest.machine.step(vcpu, 0));
  }
}

/** Steps until the vCPU stands at the first instruction of a handler. */
function stepIntoHandler(guest: EmbeddedGuest, events: readonly EngineEvent[], vcpu: number): Relocated {
  for (let steps = 0; steps < 2_000_000; steps++) {
    const handler = handlerAt(events, guest.machine.registers(vcpu).rip);
    if (handler !== undefined) return handler;
    if (steps % 20_000 === 19_999) guest.tick(vcpu);
    stepOnce(guest, vcpu);
  }
  throw new Error('no handler was entered');
}

describe('engine on the embedded guest', () => {
  test('the guest computes what it did, sees no changed byte, and is identical after unload', () => {
    const guest = EmbeddedGuest.boot({ seed: 11 });
    const before = guest.image();
    const { engine, events, journal } = guest.attach();
    hookAll(guest, engine);
    engine.relocating = true;
    const sweeps = guest.report().integrity.sweeps;
    serve(
      guest,
      engine,
      () => relocations(events).length > 20 && guest.report().integrity.sweeps > sweeps + 1n,
    );
    expect(guest.image()).not.toBe(before);
    expect(journal.outstanding).toBeGreaterThan(20);
    engine.unload();
    guest.hypervisor.listen(20);
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.report().integrity.mismatches).toBe(0n);
    expect(guest.report().bugCheck).toBeUndefined();
    expect(guest.image()).toBe(before);
    expect(journal.outstanding).toBe(0);
  });

  test('every site that can be relocated is, every look-alike is left alone with a reason', () => {
    const guest = EmbeddedGuest.boot({ seed: 12 });
    const { engine, kernel, events } = guest.attach({ threshold: 1 });
    hookAll(guest, engine);
    engine.relocating = true;
    const rvaOf = (site: bigint) => Number(site - kernel.base);
    const { sites } = guest.artefacts.sites;
    // Only what lies on a trapped page can be seen to trap.
    for (let i = 0; i < 3000; i++) {
      guest.hypervisor.listen(1);
      engine.work();
    }
    const relocated = new Set(relocations(events).map(({ site }) => rvaOf(site)));
    const relocatable = new Set(
      sites.filter(({ expected }) => expected === 'relocatable').map(({ loadRva }) => loadRva),
    );
    expect([...relocated].filter((rva) => !relocatable.has(rva))).toEqual([]);
    expect(relocated.size).toBeGreaterThan(30);
    for (const event of events) {
      if (event.type === 'refused') expect(event.reason).not.toBe('');
    }
    engine.unload();
  });

  test('a vCPU inside a handler blocks the scan at every instruction boundary, then leaves', () => {
    const { guest, engine, kernel, events } = relocatedGuest({ vcpus: 1 });
    stepIntoHandler(guest, events, 0);
    let boundaries = 0;
    for (;;) {
      const handler = handlerAt(events, guest.machine.registers(0).rip);
      if (handler === undefined) break;
      boundaries++;
      const range = {
        start: handler.handler,
        end: handler.handler + BigInt(handler.handlerBytes),
        owner: 'x',
      };
      const scan = whileQuiescent(guest.hypervisor, () => scanGuest(guest.hypervisor, kernel, [range]));
      expect(scan.verdict).toBe('blocked');
      stepOnce(guest, 0);
    }
    // The header of the seed's handler has 12 instructions, a block two.
    expect(boundaries).toBe(14);
    engine.unload();
  });

  test('unload waits for the vCPU inside a handler, restores the site at once, and then succeeds', () => {
    const { guest, before, engine, events } = relocatedGuest({ vcpus: 1 });
    const inside = stepIntoHandler(guest, events, 0);
    guest.hypervisor.advance = () => {
      stepOnce(guest, 0);
      return [];
    };
    const report = engine.unload();
    expect(report.blocked).toBeGreaterThan(0);
    expect(report.inHandlerAtScan).toBeGreaterThan(0);
    expect(report.scans).toBeGreaterThan(report.blocked);
    const blocked = events.find((event) => event.type === 'unload-blocked');
    expect(blocked?.where.join()).toContain(inside.site.toString(16));
    expect(guest.image()).toBe(before);
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('a thread preempted inside a handler blocks unload until it has run on', () => {
    const { guest, before, engine, events } = relocatedGuest({ vcpus: 1 });
    stepIntoHandler(guest, events, 0);
    guest.tick(0);
    // The interrupt is taken, and the scheduler picks another thread.
    for (let i = 0; i < 20_000; i++) stepOnce(guest, 0);
    expect(handlerAt(events, guest.machine.registers(0).rip)).toBeUndefined();
    let listens = 0;
    guest.hypervisor.advance = () => {
      if (++listens % 200 === 0) guest.tick(0);
      for (let i = 0; i < 200; i++) stepOnce(guest, 0);
      return [];
    };
    const report = engine.unload();
    expect(report.blocked).toBeGreaterThan(0);
    const places = events.flatMap((event) => (event.type === 'unload-blocked' ? event.where : []));
    expect(places.some((place) => place.includes('thread stack'))).toBe(true);
    expect(guest.image()).toBe(before);
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('an event that was under way when its site was relocated completes with the old load', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 2, seed: 5 });
    const { engine, kernel, events } = guest.attach({ threshold: 1 });
    hookAll(guest, engine);
    const { sites } = guest.artefacts.sites;
    const loads = new Map(
      sites
        .filter(({ form, expected }) => form === 'one-level' && expected === 'relocatable')
        .map((site) => [kernel.base + BigInt(site.loadRva), site]),
    );
    // Hold back the first violation of a one-level site, as a vCPU inside the hypervisor's emulator would.
    let held: Trap | undefined;
    guest.hypervisor.advance = (machine) => {
      const { traps } = machine.run(500);
      held ??= traps.find(({ rip }) => loads.has(rip));
      return traps.filter((trap) => trap !== held);
    };
    engine.relocating = true;
    const rip = () => held?.rip;
    serve(guest, engine, () => relocations(events).some(({ site }) => site === rip()));
    const stale = engine.statistics().staleEvents;
    const { rax, ...old } = guest.machine.registers(held!.vcpu);
    const site = loads.get(held!.rip)!;
    const index = Number(({ rax, ...old } as Record<string, bigint>)[site.idx]! & 0xffffffffn);
    const entry = Buffer.from(kernel.image.read(site.tableRva + index * 4, 4)).readUInt32LE();
    guest.hypervisor.deliver([held!]);
    guest.hypervisor.listen(0);
    const now = guest.machine.registers(held!.vcpu);
    expect(now[site.dst]).toBe(BigInt(entry));
    expect(now.rip).toBe(held!.rip + BigInt(held!.instruction.length));
    expect(engine.statistics().staleEvents).toBe(stale + 1);
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('hooks that cannot be placed are refused with the reason, and leave the guest as it was', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 1 });
    const before = guest.image();
    const { engine, journal } = guest.attach();
    for (const { function: name, reason } of guest.artefacts.sites.unhookable) {
      expect(() => engine.hook(`nt!${name}`)).toThrow(
        expect.objectContaining({ code: 'HOOK_REFUSED', context: expect.objectContaining({ reason }) }),
      );
    }
    expect(() => engine.hook('nt!NoSuchFunction')).toThrow(
      expect.objectContaining({ code: 'SYMBOL_NOT_FOUND' }),
    );
    expect(() => engine.hook('NtCreateFile')).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
    expect(() => engine.hook('nt!PsInitialSystemProcess')).toThrow(
      expect.objectContaining({ code: 'HOOK_REFUSED' }),
    );
    expect(guest.image()).toBe(before);
    expect(journal.outstanding).toBe(0);
    expect(engine.statistics().slack.free).toBe(engine.statistics().slack.bytes);
  });

  test('whichever call fails while a hook is placed, the guest is as it was', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 1 });
    const before = guest.image();
    const failing = failingHypervisor(guest.hypervisor);
    const { engine, journal } = guest.attach({ hypervisor: failing.hypervisor });
    const name = `nt!${guest.artefacts.sites.defaultHooks[0]}`;
    let failures = 0;
    for (let n = 1; ; n += n < 40 ? 1 : 7) {
      failing.failAt(n);
      try {
        engine.hook(name);
        break;
      } catch (error) {
        expect(error).toMatchObject({ code: 'HYPERVISOR_FAILED' });
        failures++;
        expect(guest.image()).toBe(before);
        expect(journal.outstanding).toBe(0);
      }
    }
    expect(failures).toBeGreaterThan(20);
    failing.failAt(0);
    engine.unload();
    expect(guest.image()).toBe(before);
  });

  test('a vCPU in user mode is no obstacle and does not hide the kernel', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 1 });
    guest.stopTimer();
    let found = false;
    for (let i = 0; i < 200_000 && !found; i++) {
      if (i % 2000 === 0) guest.tick(0);
      guest.machine.step(0, 10);
      found = inUserMode(guest.machine.registers(0));
    }
    expect(found).toBe(true);
    const { engine } = guest.attach();
    expect(engine.unload()).toMatchObject({ scans: 1, blocked: 0 });
  });
});

import { describe, expect, test } from 'vitest';
import { MemtablesError } from '../../src/errors.js';
import type { RefusalHazard } from '../../src/guest/artefacts.js';
import { processes } from '../../src/nt/processes.js';
import { findProcessor } from '../../src/nt/processors.js';
import { threads } from '../../src/nt/threads.js';
import { scanGuest } from '../../src/safety/scan.js';
import { gfnOf, hex } from '../../src/vmi/address.js';
import { whileQuiescent } from '../../src/vmi/quiescence.js';
import { inUserMode } from '../../src/x86/registers.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { failingHypervisor } from '../support/failing-hypervisor.js';
import {
  boundariesOf,
  handlerAt,
  handlersOf,
  hookAll,
  preemptAt,
  rangeOf,
  relocatedGuest,
  relocations,
  runSwitches,
  serve,
  stepInto,
  stepOnce,
  workAll,
} from './relocated-guest.js';

/** _KSWITCH_FRAME, at the saved stack pointer; the home space of a _KEXCEPTION_FRAME lies above. */
const SWITCH_FRAME_BYTES = 0x40n;

describe('engine on the embedded guest', () => {
  test('the guest computes what it did, sees no changed byte, and is identical after unload', () => {
    const guest = EmbeddedGuest.boot({ seed: 11 });
    const before = guest.image();
    const { engine, events, journal } = guest.attach();
    hookAll(guest, engine);
    engine.relocating = true;
    const sweeps = guest.report().integrity.sweeps;
    serve(
      guest.hypervisor,
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
    expect(guest.hypervisor.trappedFrames).toEqual([]);
    expect(journal.outstanding).toBe(0);
    expect(engine.statistics().slack.free).toBe(engine.statistics().slack.bytes);
  });

  test('sites that are hot already are relocated as soon as relocation is switched on', () => {
    const guest = EmbeddedGuest.boot({ seed: 14 });
    const { engine, events } = guest.attach({ threshold: 5 });
    hookAll(guest, engine);
    serve(guest.hypervisor, engine, () => engine.statistics().tableLoads > 1000);
    expect(relocations(events)).toEqual([]);
    engine.relocating = true;
    workAll(engine);
    expect(relocations(events).length).toBeGreaterThan(20);
    for (const { hits } of relocations(events)) expect(hits).toBeGreaterThan(5);
    engine.unload();
  });

  test('every site that can be relocated is; every look-alike is left alone, for its own reason', () => {
    const guest = EmbeddedGuest.boot({ seed: 12 });
    const before = guest.image();
    const { engine, kernel, events } = guest.attach({ threshold: 1 });
    hookAll(guest, engine);
    const { sites } = guest.artefacts.sites;
    // No hook can be placed where some look-alikes are, but their pages may be trapped for other reasons.
    const tables = sites.filter(({ form }) => form === 'look-alike').map(({ tableRva }) => tableRva);
    for (const rva of tables)
      guest.hypervisor.trapAccess(gfnOf(kernel.memory.translate(kernel.base + BigInt(rva))));
    engine.relocating = true;
    const rvaOf = (site: bigint) => Number(site - kernel.base);
    const wanted = sites.filter(({ expected }) => expected === 'relocatable').map(({ loadRva }) => loadRva);
    const done = () => new Set(relocations(events).map(({ site }) => rvaOf(site)));
    const lookAlikes = () => guest.report().switches['look-alike'];
    const start = lookAlikes();
    const rounds = 16n * BigInt(tables.length);
    serve(
      guest.hypervisor,
      engine,
      () => lookAlikes() > start + rounds && wanted.every((rva) => done().has(rva)),
    );
    expect([...done()].sort()).toEqual([...wanted].sort());

    const reasons: Record<RefusalHazard, string> = {
      'not-a-switch': 'not-a-switch',
      scale: 'scale-not-4',
      'base-is-not-the-image': 'base-not-proven',
      'table-outside-code': 'table-not-in-executable-section',
      pageable: 'pageable',
      discardable: 'discardable',
      initkdbg: 'initialisation-code',
      kvascode: 'mapped-for-user-mode',
      // These break one of the candidate rules, and are never counted.
      'system-service-table': 'no candidate',
      'not-a-mov': 'no candidate',
      'three-operands': 'no candidate',
      'destination-is-memory': 'no candidate',
      'no-index': 'no candidate',
      'address-size-prefix': 'no candidate',
      'operand-size': 'no candidate',
      'too-short': 'no candidate',
    };
    const refused = new Map(
      events.flatMap((event) =>
        event.type === 'refused'
          ? [[rvaOf(event.site), event.reason.replace(/^table-(?!not)/, '')] as const]
          : [],
      ),
    );
    for (const { name, loadRva, expected } of sites) {
      if (expected === 'relocatable') continue;
      expect([name, refused.get(loadRva) ?? 'no candidate']).toEqual([name, reasons[expected]]);
    }
    expect(engine.statistics().otherReads.reads).toBeGreaterThan(0);
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.image()).toBe(before);
  });

  test('a load that trapped exactly as often as the threshold says is not relocated yet', () => {
    const guest = EmbeddedGuest.boot({ seed: 15, vcpus: 1 });
    // Inline, one may have to wait for a thread to leave the site.
    const { engine, events } = guest.attach({ threshold: 20, handler: 'lean' });
    hookAll(guest, engine);
    engine.relocating = true;
    serve(guest.hypervisor, engine, () => relocations(events).length > 5);
    // In a work step for each violation, a site is relocated at the first hit above the threshold.
    for (const { hits } of relocations(events)) expect(hits).toBe(21);
    engine.unload();
  });

  test('unload waits for the vCPU inside a handler on the stack, restores the site at once, and then succeeds', () => {
    const { guest, before, engine, events } = relocatedGuest({ vcpus: 1, handler: 'seed' });
    const inside = stepInto(guest, 0, (rip) => handlerAt(events, rip));
    let steps = 0;
    guest.hypervisor.advance = () => {
      if (++steps % 5000 === 0) guest.tick(0);
      stepOnce(guest, 0);
      return [];
    };
    const report = engine.unload();
    expect(report.blocked).toBeGreaterThan(0);
    expect(report.inHandlerAtScan).toBeGreaterThan(0);
    expect(report.scans).toBeGreaterThan(report.blocked);
    const blocked = events.find((event) => event.type === 'unload-blocked');
    // By its switch, also where the handler is that of the byte load.
    const { site } = relocations(events).find(({ handlers }) => handlers.includes(inside))!;
    expect(blocked?.where.join()).toContain(`switch at ${hex(site)}`);
    expect(guest.image()).toBe(before);
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('a thread that never leaves a handler on the stack blocks unload for good: its code stays, every site is restored', () => {
    const { guest, engine, kernel, events, journal } = relocatedGuest({
      vcpus: 1,
      handler: 'seed',
      unloadSeconds: 0.05,
    });
    stepInto(guest, 0, (rip) => handlerAt(events, rip));
    guest.hypervisor.advance = () => [];
    expect(() => engine.unload()).toThrow(expect.objectContaining({ code: 'UNLOAD_BLOCKED' }));
    expect(engine.loaded).toBe(true);
    for (const { site, gva, bytes } of handlersOf(events)) {
      const rva = Number(site - kernel.base);
      expect(Buffer.from(kernel.memory.read(site, 5))).toEqual(Buffer.from(kernel.image.read(rva, 5)));
      expect(kernel.memory.read(gva, bytes).some((byte) => byte !== 0)).toBe(true);
    }
    expect(journal.outstanding).toBeGreaterThan(0);
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    guest.startTimer();
    // Each try is as short as the first.
    for (let tries = 0; engine.loaded; tries++) {
      try {
        engine.unload();
      } catch (error) {
        if (tries === 100) throw error;
      }
    }
  });

  test('a thread preempted inside a handler on the stack blocks unload until it has run on', () => {
    const { guest, before, engine, kernel, events } = relocatedGuest({ vcpus: 1, handler: 'seed' });
    preemptAt(guest, kernel, 0, (rip) => handlerAt(events, rip));
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

  describe('a value inside a handler on the stack of a thread that never runs', () => {
    /** Puts it where KiSwapContext keeps nothing, as an earlier interrupt may have left it there. */
    function guestWithValue(frame: (handler: bigint) => bigint[], unloadSeconds: number) {
      const relocated = relocatedGuest({ vcpus: 1, unloadSeconds });
      const { guest, kernel, events } = relocated;
      const running = findProcessor(kernel, 0, guest.machine.registers(0))!.currentThread;
      const [system] = processes(kernel);
      const thread = [...threads(kernel, system!)].find(({ gva }) => gva !== running)!;
      const bytes = Buffer.alloc(40);
      frame(handlersOf(events)[0]!.gva).forEach((value, at) => {
        bytes.writeBigUInt64LE(value, at * 8);
      });
      guest.machine.writePhysical(kernel.memory.translate(thread.kernelStack + SWITCH_FRAME_BYTES), bytes);
      guest.hypervisor.advance = () => [];
      return relocated;
    }

    test('blocks at first, but not for good: our code calls nothing, so nothing returns through it', () => {
      const { before, guest, engine } = guestWithValue((handler) => [handler + 13n], 30);
      expect(engine.unload().blocked).toBeGreaterThan(0);
      expect(guest.image()).toBe(before);
    });

    test('blocks for good, but keeps no hook in place, when its stack cannot be looked at', () => {
      const { guest, engine, kernel, events } = relocatedGuest({ vcpus: 1, unloadSeconds: 1.5 });
      const running = findProcessor(kernel, 0, guest.machine.registers(0))!.currentThread;
      const [system] = processes(kernel);
      const thread = [...threads(kernel, system!)].find(({ gva }) => gva !== running)!;
      const remap = guest.unmap(thread.kernelStack);
      guest.hypervisor.advance = () => [];
      expect(() => engine.unload()).toThrow(expect.objectContaining({ code: 'UNLOAD_BLOCKED' }));
      for (const event of events) {
        if (event.type !== 'hooked') continue;
        const original = kernel.image.read(Number(event.function - kernel.base), event.replacedBytes);
        expect([...kernel.memory.read(event.function, event.replacedBytes)]).toEqual([...original]);
      }
      remap();
      guest.hypervisor.advance = (machine) => machine.run(500).traps;
      guest.startTimer();
      engine.unload();
      expect(guest.wrongStreams()).toEqual([]);
    });

    test('blocks for good when it is the RIP of a machine frame', () => {
      const frame = (handler: bigint) => [handler + 13n, 0x10n, 0x246n, 0xffff_f500_0000_1000n, 0x18n];
      const { guest, engine } = guestWithValue(frame, 1.5);
      expect(() => engine.unload()).toThrow(expect.objectContaining({ code: 'UNLOAD_BLOCKED' }));
      guest.hypervisor.advance = (machine) => machine.run(500).traps;
    });
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
    guest.hypervisor.holdBack = ({ rip }) => loads.has(rip);
    engine.relocating = true;
    serve(guest.hypervisor, engine, () =>
      relocations(events).some(({ site }) => site === guest.hypervisor.heldBack?.rip),
    );
    const held = guest.hypervisor.heldBack!;
    const stale = engine.statistics().staleEvents;
    const { tableLoads } = engine.statistics();
    const old = guest.machine.registers(held.vcpu);
    const site = loads.get(held.rip)!;
    const index = Number(old[site.idx] & 0xffffffffn);
    const entry = Buffer.from(kernel.image.read(site.tableRva + index * 4, 4)).readUInt32LE();
    guest.hypervisor.deliver([held]);
    guest.hypervisor.listen(0);
    const now = guest.machine.registers(held.vcpu);
    expect(now[site.dst]).toBe(BigInt(entry));
    expect(now.rip).toBe(held.rip + BigInt(held.instruction.length));
    expect(engine.statistics()).toMatchObject({ staleEvents: stale + 1, tableLoads });
    expect(engine.loads().find((load) => load.site === held.rip)).toMatchObject({ stale: 1 });
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
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

describe.each(['seed', 'lean', 'fused'] as const)('a %s handler', (handler) => {
  test('a vCPU inside it blocks the scan at every instruction boundary, then leaves', () => {
    const { guest, engine, kernel, events } = relocatedGuest({ vcpus: 1, handler });
    const inside = stepInto(guest, 0, (rip) => handlerAt(events, rip));
    const boundaries = boundariesOf(kernel, inside);
    const visited: (string | undefined)[] = [];
    for (;;) {
      const { rip } = guest.machine.registers(0);
      if (handlerAt(events, rip) !== inside) break;
      visited.push(boundaries.get(Number(rip - inside.gva)));
      const scan = whileQuiescent(guest.hypervisor, () =>
        scanGuest(guest.hypervisor, kernel, [rangeOf(inside)]),
      );
      expect(scan.verdict).toBe('blocked');
      stepOnce(guest, 0);
    }
    expect(new Set(visited)).toEqual(new Set(boundaries.values()));
    guest.startTimer();
    engine.unload();
  });

  test('a thread preempted at any instruction boundary blocks', () => {
    const { guest, before, engine, kernel, events } = relocatedGuest({ vcpus: 1, handler });
    const places = new Map(handlersOf(events).map((each) => [each, boundariesOf(kernel, each)]));
    for (const boundary of new Set([...places.values()].flatMap((names) => [...names.values()]))) {
      const there = preemptAt(guest, kernel, 0, (rip) => {
        const inside = handlerAt(events, rip);
        return inside && places.get(inside)!.get(Number(rip - inside.gva)) === boundary ? inside : undefined;
      });
      const { findings } = whileQuiescent(guest.hypervisor, () =>
        scanGuest(guest.hypervisor, kernel, [rangeOf(there)]),
      );
      expect(findings.some(({ isRip, thread }) => isRip && thread !== undefined)).toBe(true);
    }
    guest.startTimer();
    engine.unload();
    expect(guest.image()).toBe(before);
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('disable restores the sites and leaves the handlers: a vCPU inside one finishes normally', () => {
    const { guest, before, engine, kernel, events } = relocatedGuest({ vcpus: 1, handler });
    const inside = stepInto(guest, 0, (rip) => handlerAt(events, rip));
    engine.disable();
    const rva = Number(inside.site - kernel.base);
    expect(Buffer.from(kernel.memory.read(inside.site, 7))).toEqual(Buffer.from(kernel.image.read(rva, 7)));
    let steps = 0;
    for (; handlerAt(events, guest.machine.registers(0).rip) !== undefined; steps++) stepOnce(guest, 0);
    expect(steps).toBeGreaterThanOrEqual(new Set(boundariesOf(kernel, inside).values()).size);
    guest.startTimer();
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.image()).toBe(before);
  });

  test('what it was used for is said, and why no faster one was', () => {
    const { engine, events } = relocatedGuest({ vcpus: 1, handler });
    expect(new Set(relocations(events).map(({ encoder }) => encoder))).toEqual(new Set([handler]));
    for (const { passedOver } of relocations(events)) {
      for (const [name, reason] of Object.entries(passedOver)) {
        expect([name.split('-')[0], reason]).toEqual([handler, expect.any(String)]);
      }
    }
    engine.unload();
  });
});

describe.each(['lean', 'fused', 'guarded'] as const)('a vCPU inside a %s handler', (handler) => {
  test.each([0, 1, 2, 3, 4])(
    'is taken out of it by unload, after %i of its instructions, and does not have to run for that',
    (instructions) => {
      const { guest, before, engine, events } = relocatedGuest({ vcpus: 1, handler });
      stepInto(guest, 0, (rip) => handlerAt(events, rip));
      for (let step = 0; step < instructions; step++) stepOnce(guest, 0);
      expect(handlerAt(events, guest.machine.registers(0).rip)).toBeDefined();
      guest.startTimer();
      expect(engine.unload().evacuated.vcpus).toBe(1);
      // A thread that has been preempted inside may be in the way.
      const [first] = events.flatMap((event) => (event.type === 'unload-blocked' ? event.where : []));
      expect(first ?? '').not.toContain('is the RIP of vCPU');
      expect(guest.image()).toBe(before);
      runSwitches(guest, 1000n);
      expect(guest.wrongStreams()).toEqual([]);
      expect(guest.report().bugCheck).toBeUndefined();
    },
  );

  test('is waited for where its registers cannot be set', () => {
    const { guest, before, engine, events } = relocatedGuest({ vcpus: 1, handler });
    stepInto(guest, 0, (rip) => handlerAt(events, rip));
    guest.hypervisor.setRegisters = () => {
      throw new MemtablesError('HYPERVISOR_FAILED', 'not supported', { remedy: 'none' });
    };
    guest.startTimer();
    expect(engine.unload().evacuated.vcpus).toBe(0);
    expect(guest.image()).toBe(before);
    expect(guest.wrongStreams()).toEqual([]);
  });
});

describe('whatever call fails', () => {
  test('while a hook is placed, the guest is as it was', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 1 });
    const before = guest.image();
    const failing = failingHypervisor(guest.hypervisor);
    const { engine, journal } = guest.attach({ hypervisor: failing.hypervisor });
    const name = 'nt!RtlGetVersion';
    engine.hook(name);
    engine.unload();
    // Nothing calls it, and from here on the guest stands still, where it could be hooked: each attempt makes the same
    // calls.
    guest.hypervisor.advance = () => [];
    const callsBefore = failing.log.length;
    engine.hook(name);
    const calls = failing.log.length - callsBefore;
    expect(calls).toBeGreaterThan(70);
    engine.unload();
    expect(guest.image()).toBe(before);
    // The scan in the middle makes hundreds of reads: not each of them is tried. The changes come last.
    const inTheMiddle = (n: number) => n > 30 && n < calls - 40 && n % 37 !== 0;
    for (let n = 1; n <= calls; n++) {
      if (inTheMiddle(n)) continue;
      failing.failAt(n);
      expect(() => engine.hook(name)).toThrow(expect.objectContaining({ code: 'HYPERVISOR_FAILED' }));
      expect(guest.image()).toBe(before);
      expect(guest.hypervisor.trappedFrames).toEqual([]);
      expect(guest.hypervisor.paused).toBe(false);
      expect(journal.outstanding).toBe(0);
    }
    engine.hook(name);
    engine.unload();
    expect(guest.image()).toBe(before);
  });

  test('while a load is relocated, the guest is as it was; other loads are relocated all the same', () => {
    const guest = EmbeddedGuest.boot({ seed: 81 });
    const before = guest.image();
    const failing = failingHypervisor(guest.hypervisor);
    const { engine, journal, events } = guest.attach({ hypervisor: failing.hypervisor, threshold: 2 });
    hookAll(guest, engine);
    serve(guest.hypervisor, engine, () => engine.statistics().tableLoads > 3000);
    // Nothing runs from here on, so that only the engine changes anything.
    guest.hypervisor.advance = () => [];
    engine.relocating = true;
    let changes = 0;
    for (let done = false; !done; ) {
      const image = guest.image();
      const frames = guest.hypervisor.trappedFrames;
      const { outstanding } = journal;
      const known = relocations(events).length;
      failing.failAtChange(++changes);
      try {
        engine.work();
        done = relocations(events).length > known;
        if (!done) changes--; // this site was refused
      } catch (error) {
        expect(error).toMatchObject({ code: 'HYPERVISOR_FAILED' });
        // Then it was the next one that failed.
        done = relocations(events).length > known;
        if (done) break;
        expect(guest.image()).toBe(image);
        expect(guest.hypervisor.trappedFrames).toEqual(frames);
        expect(guest.hypervisor.paused).toBe(false);
        expect(journal.outstanding).toBe(outstanding);
      }
    }
    // At least a write of the handler and one of the site; traps where their pages are not trapped yet.
    expect(changes).toBeGreaterThan(2);
    failing.failAt();
    workAll(engine);
    expect(relocations(events).length).toBeGreaterThan(20);
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    engine.unload();
    expect(guest.image()).toBe(before);
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('during unload, a second unload leaves the guest as it was', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 1, seed: 82 });
    const before = guest.image();
    const failing = failingHypervisor(guest.hypervisor);
    let changes = 0;
    for (let failed = true; failed; ) {
      failing.failAt();
      const { engine, journal, events } = guest.attach({ hypervisor: failing.hypervisor, threshold: 1 });
      engine.hook(`nt!${guest.artefacts.sites.defaultHooks[0]}`);
      engine.relocating = true;
      serve(guest.hypervisor, engine, () => relocations(events).length > 0);
      engine.relocating = false;
      failing.failAtChange(++changes);
      try {
        engine.unload();
        failed = false;
      } catch (error) {
        expect(error).toMatchObject({ code: 'HYPERVISOR_FAILED' });
        expect(guest.hypervisor.paused).toBe(false);
        expect(engine.loaded).toBe(true);
        engine.unload();
      }
      expect(guest.image()).toBe(before);
      expect(guest.hypervisor.trappedFrames).toEqual([]);
      expect(journal.outstanding).toBe(0);
    }
    // Four pieces of code, on two frames at least.
    expect(changes).toBeGreaterThan(6);
    expect(guest.wrongStreams()).toEqual([]);
  });
});

import { describe, expect, test } from 'vitest';
import { MemtablesError } from '../../src/errors.js';
import { planHandlers } from '../../src/handlers/planner.js';
import type { Handler } from '../../src/memtables/report.js';
import type { Kernel } from '../../src/nt/kernel.js';
import { FunctionTable } from '../../src/nt/pdata.js';
import { scanGuest } from '../../src/safety/scan.js';
import { SwitchRecogniser } from '../../src/switches/table.js';
import { gfnOf } from '../../src/vmi/address.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import {
  handlersOf,
  hookAll,
  insideSites,
  instructionsOf,
  MOST_SITE_BYTES,
  preemptAt,
  relocatedGuest,
  relocations,
  runSwitches,
  serve,
  stepInto,
  stepOnce,
  workAll,
} from './relocated-guest.js';

/** The instructions of the guest's own code from `site` to the switch's jump, behind the first. */
function interiorOf(kernel: Kernel, site: bigint): Set<bigint> {
  const rva = Number(site - kernel.base);
  return instructionsOf(kernel.image.read(rva, MOST_SITE_BYTES), site);
}

/** A guest with inline sites, and a vCPU that stands inside one of them; it only runs as it is stepped. */
function guestInside() {
  const relocated = relocatedGuest({ vcpus: 1, handler: 'inline' });
  const { guest, kernel, events } = relocated;
  const inside = insideSites(kernel, events);
  return { ...relocated, inside, handler: stepInto(guest, 0, (rip) => inside.get(rip)) };
}

/** A guest whose loads are hot, but not relocated yet; it only runs as it is stepped. */
function hotGuest(handler: 'inline' | 'auto') {
  const guest = EmbeddedGuest.boot({ vcpus: 1, seed: 17 });
  const before = guest.image();
  const attached = guest.attach({ threshold: 2, handler });
  // Not all, so that there is slack enough for every switch.
  for (const name of guest.artefacts.sites.defaultHooks.slice(0, 2)) attached.engine.hook(`nt!${name}`);
  serve(guest.hypervisor, attached.engine, () => attached.engine.statistics().tableLoads > 1000);
  guest.stopTimer();
  const { kernel } = attached;
  const trapped = guest.hypervisor.trappedFrames;
  const recogniser = new SwitchRecogniser(kernel.image, FunctionTable.read(kernel.image));
  const canBeInline = (rva: number) => {
    const proof = recogniser.prove(rva);
    return proof.found && planHandlers(proof, kernel.base, 'inline').some(({ refused }) => !refused);
  };
  /** By the address of an instruction behind a load: that load. */
  const interiors = new Map(
    guest.artefacts.sites.sites
      .filter(({ form, expected }) => form === 'one-level' && expected === 'relocatable')
      .filter(({ tableRva: rva }) =>
        trapped.includes(gfnOf(kernel.memory.translate(kernel.base + BigInt(rva)))),
      )
      .filter(({ loadRva }) => canBeInline(loadRva))
      .flatMap(({ loadRva }) => {
        const site = kernel.base + BigInt(loadRva);
        return [...interiorOf(kernel, site)].map((rip) => [rip, site] as const);
      }),
  );
  return { guest, before, interiors, ...attached };
}

test('the guest computes what it did, sees no changed byte, and is identical after unload', () => {
  const guest = EmbeddedGuest.boot({ seed: 18 });
  const before = guest.image();
  const { engine, events, journal } = guest.attach({ threshold: 2, handler: 'inline' });
  hookAll(guest, engine);
  engine.relocating = true;
  const { sweeps } = guest.report().integrity;
  serve(
    guest.hypervisor,
    engine,
    () => relocations(events).length > 20 && guest.report().integrity.sweeps > sweeps + 1n,
  );
  expect(new Set(relocations(events).map(({ encoder }) => encoder))).toEqual(new Set(['inline']));
  engine.unload();
  expect(guest.image()).toBe(before);
  guest.hypervisor.listen(20);
  expect(guest.wrongStreams()).toEqual([]);
  expect(guest.report().integrity.mismatches).toBe(0n);
  expect(guest.report().bugCheck).toBeUndefined();
  expect(journal.outstanding).toBe(0);
});

describe('several instructions are replaced only when nothing stands among them', () => {
  test('not while a vCPU does; as soon as it has gone on', () => {
    const { guest, before, interiors, engine, kernel, events } = hotGuest('inline');
    const site = stepInto(guest, 0, (rip) => interiors.get(rip));
    guest.hypervisor.advance = () => [];
    const isDone = () => relocations(events).some((each) => each.site === site);
    engine.relocating = true;
    workAll(engine);
    expect(relocations(events).length).toBeGreaterThan(2);
    expect(isDone()).toBe(false);
    expect(kernel.memory.read(site, 7)).toEqual(
      Buffer.from(kernel.image.read(Number(site - kernel.base), 7)),
    );
    guest.startTimer();
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    serve(guest.hypervisor, engine, isDone);
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.image()).toBe(before);
  });

  test('not while a thread that was preempted there waits', () => {
    const { guest, before, interiors, engine, kernel, events } = hotGuest('inline');
    const site = preemptAt(guest, kernel, 0, (rip) => interiors.get(rip));
    expect(interiors.get(guest.machine.registers(0).rip)).toBeUndefined();
    guest.hypervisor.advance = () => [];
    const isDone = () => relocations(events).some((each) => each.site === site);
    engine.relocating = true;
    workAll(engine);
    expect(relocations(events).length).toBeGreaterThan(2);
    expect(isDone()).toBe(false);
    guest.startTimer();
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    serve(guest.hypervisor, engine, isDone);
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.image()).toBe(before);
  });

  test('where that never ends, the load alone is replaced, which needs no such moment', () => {
    const { guest, before, interiors, engine, events } = hotGuest('auto');
    const site = stepInto(guest, 0, (rip) => interiors.get(rip));
    guest.hypervisor.advance = () => [];
    engine.relocating = true;
    const done = () => relocations(events).find((each) => each.site === site);
    serve(guest.hypervisor, engine, () => done() !== undefined);
    expect(done()!.encoder).not.toBe('inline');
    expect(Object.entries(done()!.passedOver)).toContainEqual([expect.stringMatching(/^inline/), 'in-use']);
    guest.startTimer();
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.image()).toBe(before);
  });
});

test('one look at all threads is enough for many switches: the guest stands still for as long', () => {
  const { guest, before, engine, kernel, events } = hotGuest('inline');
  const processes = kernel.memory.translate(kernel.symbol('PsActiveProcessHead'));
  let looks = 0;
  const read = guest.hypervisor.readPhysical.bind(guest.hypervisor);
  guest.hypervisor.readPhysical = (gpa, length) => {
    if (gpa === processes) looks++;
    return read(gpa, length);
  };
  guest.hypervisor.advance = () => [];
  const ranges = [{ start: kernel.base, end: kernel.base + 1n, owner: 'x' }];
  scanGuest(guest.hypervisor, kernel, ranges);
  const once = looks;
  engine.relocating = true;
  engine.work();
  expect(relocations(events).length).toBeGreaterThan(2);
  expect(looks - once).toBe(once);
  guest.startTimer();
  guest.hypervisor.advance = (machine) => machine.run(500).traps;
  engine.unload();
  expect(guest.wrongStreams()).toEqual([]);
  expect(guest.image()).toBe(before);
});

describe('the replaced instructions come back only when nothing stands among those in their place', () => {
  test('a vCPU is taken out by unload, and does not have to run for that', () => {
    const { guest, before, engine, handler, inside } = guestInside();
    expect(inside.get(guest.machine.registers(0).rip)).toBe(handler);
    guest.startTimer();
    expect(engine.unload().evacuated.vcpus).toBe(1);
    expect(guest.image()).toBe(before);
    runSwitches(guest, 1000n);
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.report().bugCheck).toBeUndefined();
  });

  test('a vCPU whose registers cannot be set is waited for; the other sites are restored meanwhile', () => {
    const { guest, before, engine, kernel, events, handler, inside } = guestInside();
    guest.hypervisor.setRegisters = () => {
      throw new MemtablesError('HYPERVISOR_FAILED', 'not supported', { remedy: 'none' });
    };
    const isChanged = ({ site }: Handler) => {
      const original = kernel.image.read(Number(site - kernel.base), MOST_SITE_BYTES);
      return Buffer.compare(kernel.memory.read(site, MOST_SITE_BYTES), original) !== 0;
    };
    let seen: (readonly Handler[])[] = [];
    guest.hypervisor.advance = () => {
      seen = [...seen, handlersOf(events).filter(isChanged)];
      for (let steps = 0; steps < 200; steps++) stepOnce(guest, 0);
      return [];
    };
    engine.unload();
    expect(seen[0]).toEqual([handler]);
    expect(inside.has(guest.machine.registers(0).rip)).toBe(false);
    expect(guest.image()).toBe(before);
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('a thread that was preempted there goes on with the guest’s own code', () => {
    const { guest, before, engine, kernel, inside } = guestInside();
    preemptAt(guest, kernel, 0, (rip) => inside.get(rip));
    guest.startTimer();
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    engine.unload();
    expect(guest.image()).toBe(before);
    runSwitches(guest, 1000n);
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.report().bugCheck).toBeUndefined();
  });
});

test('disable waits for the vCPU among them, which finishes normally', () => {
  const { guest, before, engine, kernel, events, handler, inside } = guestInside();
  let waited = 0;
  guest.hypervisor.advance = () => {
    waited++;
    stepOnce(guest, 0);
    return [];
  };
  engine.disable();
  expect(waited).toBeGreaterThan(0);
  expect(inside.get(guest.machine.registers(0).rip)).not.toBe(handler);
  for (const { site } of handlersOf(events)) {
    const original = kernel.image.read(Number(site - kernel.base), MOST_SITE_BYTES);
    expect([...kernel.memory.read(site, MOST_SITE_BYTES)]).toEqual([...original]);
  }
  guest.hypervisor.advance = (machine) => machine.run(500).traps;
  guest.startTimer();
  engine.unload();
  expect(guest.image()).toBe(before);
  expect(guest.wrongStreams()).toEqual([]);
});

test('unload leaves a vCPU alone that stands in code which has been put back, where an instruction of ours began', () => {
  const { guest, before, engine, kernel, events, inside } = guestInside();
  guest.hypervisor.advance = () => {
    stepOnce(guest, 0);
    return [];
  };
  engine.disable();
  const restored = new Set(handlersOf(events).flatMap(({ site }) => [...interiorOf(kernel, site)]));
  stepInto(guest, 0, (rip) => (restored.has(rip) ? inside.get(rip) : undefined));
  guest.hypervisor.advance = () => [];
  const registers = guest.machine.registers(0);
  expect(engine.unload().evacuated).toEqual({ vcpus: 0, threads: 0 });
  expect(guest.machine.registers(0)).toEqual(registers);
  expect(guest.image()).toBe(before);
  guest.startTimer();
  runSwitches(guest, 1000n);
  expect(guest.wrongStreams()).toEqual([]);
});

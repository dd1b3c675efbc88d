import { describe, expect, onTestFinished, test, vi } from 'vitest';
import type { Engine } from '../../src/memtables/engine.js';
import type { EngineEvent } from '../../src/memtables/report.js';
import { gfnOf, PAGE_SIZE, pageBase } from '../../src/vmi/address.js';
import { DRIVER, type DriverGuest, guestWithDriver, hashOf } from './driver-guest.js';
import { relocations, serve, workAll } from './relocated-guest.js';

/** Too far from NT for a jump to its slack. */
const FAR = 0x1_0000_0000n;

function hookDriver({ guest }: DriverGuest, engine: Engine): void {
  for (const name of guest.artefacts.sites.defaultHooks) engine.hook(`driver!${name}`);
}

/** Relocates most of what can be relocated in the driver. */
function relocateAll(
  driver: DriverGuest,
  engine: Engine,
  events: readonly EngineEvent[],
  count: number,
): void {
  hookDriver(driver, engine);
  engine.relocating = true;
  serve(driver.guest.hypervisor, engine, () => relocations(events).length >= count);
}

/** Later, as far as anybody can tell who looks at the clock. */
function passSeconds(seconds: number): void {
  const now = performance.now.bind(performance);
  const spy = vi.spyOn(performance, 'now').mockImplementation(() => now() + seconds * 1000);
  onTestFinished(() => spy.mockRestore());
}

function refusal(reason: string) {
  return expect.objectContaining({ code: 'HOOK_REFUSED', context: expect.objectContaining({ reason }) });
}

describe('the switches of a driver are relocated, and the guest computes what it did', () => {
  test.each([
    ['in the slack of NT', 0x2000_0000n],
    ['in its own slack, where that of NT is out of reach', FAR],
  ])('%s', (_, distance) => {
    const driver = guestWithDriver({ seed: 81, distance });
    const { guest, base } = driver;
    const before = driver.image();
    const { engine, events, kernel } = driver.attach({ threshold: 2 });
    expect(engine.moduleCount).toBe(1);
    relocateAll(driver, engine, events, 10);
    const places = guest.artefacts.sites.sites.map(({ loadRva }) => base + BigInt(loadRva));
    const handlers = relocations(events).flatMap(({ site, module, handlers }) => {
      expect(module).toBe(DRIVER);
      expect(places).toContain(site);
      return handlers;
    });
    for (const { gva } of handlers) expect(kernel.contains(gva)).toBe(distance !== FAR);
    const { slack } = engine.statistics();
    expect(slack.free).toBeLessThan(slack.bytes);
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
    expect(driver.image()).toEqual(before);
    driver.leaveDriver();
    expect(driver.isNtAsBooted()).toBe(true);
  });

  test('in its own slack, once that of NT is used up', () => {
    const driver = guestWithDriver({ seed: 82 });
    // Not that of the driver, which was copied before.
    driver.guest.spoilSlack();
    const { engine, events, kernel } = driver.attach({ threshold: 2 });
    relocateAll(driver, engine, events, 5);
    const handlers = relocations(events).flatMap((event) => event.handlers);
    expect(handlers.some(({ gva }) => kernel.contains(gva))).toBe(false);
    engine.unload();
    expect(driver.guest.wrongStreams()).toEqual([]);
  });
});

test('a load of a driver is left alone when its table is not what it was, and is named with the driver', () => {
  const driver = guestWithDriver({ seed: 71 });
  const { engine, events, kernel } = driver.attach({ threshold: 2 });
  hookDriver(driver, engine);
  serve(driver.guest.hypervisor, engine, () => engine.statistics().tableLoads > 3000);
  // An entry that no index leads to, so that the guest itself does not mind.
  const { loadRva, tableRva } = driver.guest.artefacts.sites.sites.find(
    ({ name }) => name === 'MmProbeAndLockPages',
  )!;
  driver.guest.machine.writePhysical(
    kernel.memory.translate(driver.base + BigInt(tableRva + 4)),
    Buffer.from([1]),
  );
  engine.relocating = true;
  workAll(engine);
  expect(events).toContainEqual(
    expect.objectContaining({
      type: 'refused',
      site: driver.base + BigInt(loadRva),
      reason: 'code-has-changed',
      module: DRIVER,
    }),
  );
  expect(relocations(events).length).toBeGreaterThan(10);
  engine.unload();
});

describe('a hook in a module', () => {
  const attached = () => {
    const driver = guestWithDriver({ vcpus: 1, seed: 84 });
    return { driver, ...driver.attach() };
  };
  const missing = expect.objectContaining({ code: 'SYMBOL_NOT_FOUND' });

  test('is refused, with the reason, where there is no such module or function', () => {
    const { driver, engine, kernel } = attached();
    const before = driver.image();
    const inside = kernel.symbolRva('NtCreateFile') + 4;
    const cases = [
      ['other!NtCreateFile', missing],
      ['driver!NoSuchFunction', missing],
      ['driver+0x7fffffff', refusal('not-code')],
      ['driver+0x0', refusal('not-code')],
      [`driver+0x${inside.toString(16)}`, refusal('not-a-function-start')],
      ['driver!NtQueryEaFile', refusal('pageable')],
      ['driver+', expect.objectContaining({ code: 'INVALID_ARGUMENT' })],
    ] as const;
    for (const [name, expected] of cases) expect(() => engine.hook(name)).toThrow(expected);
    expect(driver.image()).toEqual(before);
  });

  test('may be named by its address, and is one hook by whatever name', () => {
    const { driver, engine, kernel, events } = attached();
    const before = driver.image();
    const rva = kernel.symbolRva('NtCreateFile');
    engine.hook(`DRIVER.SYS+0x${rva.toString(16).toUpperCase()}`);
    expect(events).toContainEqual(
      expect.objectContaining({ type: 'hooked', function: driver.base + BigInt(rva) }),
    );
    expect(() => engine.hook('driver!NtCreateFile')).toThrow(refusal('hooked-already'));
    engine.hook('nt!NtCreateFile');
    engine.unload();
    expect(driver.image()).toEqual(before);
  });

  test('is found in a module that was loaded after the tool had attached', () => {
    const { driver, engine } = attached();
    const list = driver.unlist();
    const later = driver.attach();
    expect(later.engine.moduleCount).toBe(0);
    expect(() => later.engine.hook('driver!NtCreateFile')).toThrow(missing);
    list.restore();
    later.engine.hook('driver!NtCreateFile');
    later.engine.unload();
    engine.unload();
  });

  test('is refused where another image lies by now', () => {
    const { driver, engine } = attached();
    engine.hook('driver!NtCreateFile');
    driver.memory.write(driver.base + 0x88n, Buffer.from([0x42]));
    expect(() => engine.hook('driver!KeSetTimerEx')).toThrow(refusal('image-has-changed'));
    engine.unload();
  });
});

describe('a driver that is unloaded', () => {
  const unloaded = (events: readonly EngineEvent[]) =>
    events.filter(({ type }) => type === 'module-unloaded');

  /** Its code is changed; then the guest leaves it and unmaps it. */
  function unloadedDriver(distance: bigint) {
    const driver = guestWithDriver({ seed: 85, distance });
    const before = driver.image();
    const attached = driver.attach({ threshold: 2 });
    relocateAll(driver, attached.engine, attached.events, 10);
    // What becomes hot in NT from now on is not the matter here.
    attached.engine.relocating = false;
    driver.leaveDriver();
    for (let i = 0; i < 100; i++) driver.guest.hypervisor.listen(1);
    workAll(attached.engine);
    expect(driver.image()).not.toEqual(before);
    const frames = driver.unmapDriver();
    return { driver, before, frames, ...attached };
  }

  test.each([
    ['in the slack of NT', 0x2000_0000n],
    ['in its own', FAR],
  ])('takes its hooks and relocations with it, with handlers %s', (_, distance) => {
    const { driver, before, frames, engine, events } = unloadedDriver(distance);
    const { guest, memory } = driver;
    // One frame is somebody else's by now; a device has written to it, which nobody can notice.
    const site = relocations(events)[0]!.site;
    const reused = frames.get(pageBase(site))!;
    const content = Buffer.alloc(PAGE_SIZE, 0x5a);
    guest.machine.writePhysical(reused, content);
    passSeconds(2);
    workAll(engine);
    const count = engine.statistics().hooks + engine.statistics().relocations;
    expect(unloaded(events).length).toBeGreaterThan(10);
    expect(guest.machine.readPhysical(reused, PAGE_SIZE).equals(content)).toBe(true);
    for (const gpa of frames.values()) expect(guest.hypervisor.trappedFrames).not.toContain(gfnOf(gpa));
    // What was not used since may come back with what is in it.
    for (const [gva, gpa] of frames) memory.remap(gva, gpa);
    const wanted = new Map(before).set(pageBase(site), hashOf(content));
    expect(driver.image()).toEqual(wanted);
    expect(count).toBe(0);
    engine.unload();
    expect(driver.image()).toEqual(wanted);
    expect(driver.isNtAsBooted()).toBe(true);
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('is noticed by an unload too, before anything is written', () => {
    const { driver, frames, engine, events } = unloadedDriver(FAR);
    const { guest } = driver;
    const content = Buffer.alloc(PAGE_SIZE, 0x5a);
    for (const gpa of frames.values()) guest.machine.writePhysical(gpa, content);
    engine.unload();
    expect(unloaded(events).length).toBeGreaterThan(10);
    for (const gpa of frames.values()) {
      expect(guest.machine.readPhysical(gpa, PAGE_SIZE).equals(content)).toBe(true);
    }
    expect(driver.isNtAsBooted()).toBe(true);
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('and of which another copy is loaded in its place, is given up as well', () => {
    const { driver, frames, engine } = unloadedDriver(FAR);
    const { guest, memory } = driver;
    const content = Buffer.alloc(PAGE_SIZE, 0x5a);
    for (const [gva, gpa] of frames) {
      guest.machine.writePhysical(gpa, content);
      memory.remap(gva, gpa);
    }
    engine.unload();
    for (const gva of frames.keys()) expect(memory.read(gva, PAGE_SIZE)!.equals(content)).toBe(true);
    expect(driver.isNtAsBooted()).toBe(true);
  });
});

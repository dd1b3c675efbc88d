import { describe, expect, test, vi } from 'vitest';
import type { HandlerChoice } from '../../src/handlers/planner.js';
import { PAGE_SIZE } from '../../src/vmi/address.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import {
  handlersOf,
  hookAll,
  insideSites,
  MOST_SITE_BYTES,
  relocations,
  serve,
  stepInto,
  stepOnce,
  workAll,
} from './relocated-guest.js';

/** `mov [rcx], dl`, and a jump to itself. */
const STORE = Buffer.from([0x88, 0x11, 0xeb, 0xfe]);
const STORE_BYTES = 2n;

/** A guest with code of the test's in it that stores a byte anywhere, read-only pages included. */
function guestThatWrites(handler: HandlerChoice = 'lean') {
  const guest = EmbeddedGuest.boot({ vcpus: 1, seed: 31 });
  const { machine, loaded } = guest;
  const section = guest.peSection('MINIEX');
  const code = loaded.kernelBase + BigInt(section.rva + PAGE_SIZE - STORE.length);
  machine.writePhysical(loaded.translate(code)!, STORE);
  const attached = guest.attach({ threshold: 2, handler });
  hookAll(guest, attached.engine);
  attached.engine.relocating = true;
  serve(guest.hypervisor, attached.engine, () => relocations(attached.events).length >= 10);
  attached.engine.relocating = false;
  guest.stopTimer();

  /** What a driver that patches the kernel does; the vCPU goes on as if nothing had been. */
  const store = (gva: bigint, byte: number) => {
    guest.makeWritable(gva);
    const before = machine.registers(0);
    machine.setRegisters(0, { rip: code, rcx: gva, rdx: BigInt(byte) });
    const { trap } = machine.step(0, 1);
    expect(trap).toMatchObject({ kind: 'violation', access: 'write', gva });
    guest.hypervisor.deliver([trap!]);
    guest.hypervisor.listen(0);
    expect(machine.registers(0).rip).toBe(code + STORE_BYTES);
    const { rip, rcx, rdx } = before;
    machine.setRegisters(0, { rip, rcx, rdx });
  };
  return { guest, store, ...attached };
}

function sleep(milliseconds: number): void {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, milliseconds);
}

describe('a guest write over hidden bytes completes, is reported, and takes the change back', () => {
  test('over a relocated load: the guest has its own code again, and the rest of the load', () => {
    const { guest, store, engine, kernel, events } = guestThatWrites();
    const { site } = handlersOf(events)[0]!;
    const rva = Number(site - kernel.base);
    const [first] = kernel.image.read(rva, 1);
    store(site, first!);
    expect(engine.statistics().cloakedWrites).toBe(1);
    workAll(engine);
    expect(events.at(-1)).toMatchObject({ type: 'taken-back', at: site });
    expect(Buffer.from(kernel.memory.read(site, 7))).toEqual(Buffer.from(kernel.image.read(rva, 7)));
    expect(engine.statistics().refused).toMatchObject({ 'overwritten-by-guest': 1 });
    guest.startTimer();
    engine.unload();
    expect(engine.statistics().relocations).toBe(0);
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.report().bugCheck).toBeUndefined();
  });

  test('with a byte that differs: it stays, it is what the guest wanted', () => {
    const { guest, store, engine, kernel, events } = guestThatWrites();
    const { site } = handlersOf(events).at(-1)!;
    const original = kernel.image.read(Number(site - kernel.base), 7);
    store(site + 6n, 0x77);
    workAll(engine);
    expect([...kernel.memory.read(site, 7)]).toEqual([...original.subarray(0, 6), 0x77]);
    // Its code is broken now, by its own doing: mend it before anything executes it.
    store(site + 6n, original[6]!);
    guest.startTimer();
    engine.unload();
    expect([...kernel.memory.read(site, 7)]).toEqual([...original]);
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('its slack is freed as soon as nothing is inside, and used again', () => {
    const { guest, store, engine, kernel, events } = guestThatWrites();
    const victim = handlersOf(events)[0]!;
    const isInside = (gva: bigint) => gva >= victim.gva && gva < victim.gva + BigInt(victim.bytes);
    const rva = Number(victim.site - kernel.base);
    const { free } = engine.statistics().slack;
    // A vCPU inside the handler: its code has to stay.
    stepInto(guest, 0, (rip) => (isInside(rip) ? victim : undefined));
    store(victim.site, kernel.image.read(rva, 1)[0]!);
    workAll(engine);
    expect(engine.statistics().slack.free).toBe(free);
    while (isInside(guest.machine.registers(0).rip)) guest.machine.step(0, 1);
    // Another write that concerns us brings the next work step; its time comes when the guest has run for long enough.
    for (const { site } of handlersOf(events).filter((each) => each.site !== victim.site)) {
      if (engine.statistics().slack.free > free) break;
      sleep(400);
      store(site, kernel.image.read(Number(site - kernel.base), 1)[0]!);
      workAll(engine);
    }
    expect(engine.statistics().slack.free).toBeGreaterThanOrEqual(free + victim.bytes);
    expect(kernel.memory.read(victim.gva, victim.bytes).every((byte) => byte === 0)).toBe(true);
    guest.startTimer();
    engine.relocating = true;
    const known = handlersOf(events).length;
    const added = () => handlersOf(events).slice(known);
    serve(guest.hypervisor, engine, () => added().some(({ gva }) => isInside(gva)));
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('next to hidden bytes, on the same page, nothing is taken back', () => {
    const { guest, store, engine, kernel, events } = guestThatWrites();
    const { site } = handlersOf(events)[0]!;
    // Behind the longest load there is: that of a byte into one of r8 to r15.
    const behind = site + 9n;
    const [byte] = kernel.image.read(Number(behind - kernel.base), 1);
    const count = events.length;
    store(behind, byte!);
    workAll(engine);
    expect(engine.statistics().cloakedWrites).toBe(0);
    expect(events.length).toBe(count);
    guest.startTimer();
    engine.unload();
  });

  test('over several instructions of ours: once the vCPU among them has gone on', () => {
    const { guest, store, engine, kernel, events } = guestThatWrites('inline');
    const inside = insideSites(kernel, events);
    const { site } = stepInto(guest, 0, (rip) => inside.get(rip));
    const standsInside = () => inside.get(guest.machine.registers(0).rip)?.site === site;
    const original = kernel.image.read(Number(site - kernel.base), MOST_SITE_BYTES);
    const memory = () => Buffer.from(kernel.memory.read(site, MOST_SITE_BYTES));
    const isRestored = () => memory().equals(original);
    const ours = memory();
    store(site, original[0]!);
    guest.hypervisor.advance = () => [];
    workAll(engine);
    expect(events.at(-1)).toMatchObject({ type: 'taken-back', at: site });
    expect([standsInside(), isRestored()]).toEqual([true, false]);
    store(site + 1n, original[1]!);
    workAll(engine);
    expect(events.filter(({ type }) => type === 'taken-back')).toHaveLength(1);
    // Until then a vCPU that comes again does not execute a mix of both.
    expect(memory()).toEqual(ours);
    while (standsInside()) stepOnce(guest, 0);
    stepInto(guest, 0, (rip) => (rip === site ? rip : undefined));
    stepOnce(guest, 0);
    expect(standsInside()).toBe(true);
    while (standsInside()) stepOnce(guest, 0);
    serve(guest.hypervisor, engine, isRestored);
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    guest.startTimer();
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.report().bugCheck).toBeUndefined();
  });

  test('over all of them: they are no longer ours at once, whoever stands there', () => {
    const { guest, store, engine, kernel, events } = guestThatWrites('inline');
    const inside = insideSites(kernel, events);
    const { site } = stepInto(guest, 0, (rip) => inside.get(rip));
    const original = kernel.image.read(Number(site - kernel.base), MOST_SITE_BYTES);
    guest.hypervisor.advance = () => [];
    for (const [i, byte] of original.entries()) store(site + BigInt(i), byte);
    workAll(engine);
    expect(Buffer.from(kernel.memory.read(site, MOST_SITE_BYTES))).toEqual(Buffer.from(original));
    expect(engine.hasWork).toBe(false);
  });

  test('where a vCPU stays among them, the guest is not paused for that again and again', () => {
    const { guest, store, engine, kernel, events } = guestThatWrites('inline');
    const inside = insideSites(kernel, events);
    const { site } = stepInto(guest, 0, (rip) => inside.get(rip));
    let now = performance.now() + 1000;
    const clock = vi.spyOn(performance, 'now').mockImplementation(() => now);
    store(site, kernel.image.read(Number(site - kernel.base), 1)[0]!);
    engine.work();
    const waits = [5, 10, 20, 40, 80].map((most) => {
      let waited = 0;
      for (; !engine.hasWork && waited < most; waited++) now++;
      engine.work();
      return waited;
    });
    clock.mockRestore();
    expect(waits).toEqual([5, 10, 20, 40, 80]);
    guest.startTimer();
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
  });
});

import { expect, test } from 'vitest';
import { SeededSchedule } from '../../src/machine/schedule.js';
import { EmbeddedGuest, TIMER_VECTOR } from '../support/embedded-guest.js';
import { handlerAt, hookAll, relocations, serve } from './relocated-guest.js';

test.each([
  { seed: 61, vcpus: 1, handler: 'seed' },
  { seed: 62, vcpus: 2, handler: 'seed' },
  { seed: 61, vcpus: 1, handler: 'auto' },
  { seed: 63, vcpus: 3, handler: 'auto' },
  { seed: 64, vcpus: 4, handler: 'auto' },
] as const)(
  'stepped by seed $seed on $vcpus vCPUs, handlers $handler: the guest computes what it did and is identical after unload',
  (options) => {
    const guest = EmbeddedGuest.boot(options);
    const before = guest.image();
    const { engine, events, journal } = guest.attach({ threshold: 2, handler: options.handler });
    guest.stopTimer();
    const schedule = new SeededSchedule(guest.machine, { seed: options.seed, timerVector: TIMER_VECTOR });
    guest.hypervisor.advance = () => schedule.advance();
    hookAll(guest, engine);
    engine.relocating = true;
    serve(guest.hypervisor, engine, () => relocations(events).length >= 20);
    // Out of those with a stack nobody is moved.
    const handlers = relocations(events).filter(
      ({ encoder }) => options.handler === 'seed' || encoder !== 'seed',
    );
    const insideHandler = () =>
      Array.from({ length: options.vcpus }, (_, vcpu) => guest.machine.registers(vcpu).rip).some(
        (rip) => handlerAt(handlers, rip) !== undefined,
      );
    serve(guest.hypervisor, engine, insideHandler);
    const report = engine.unload();
    expect(options.handler === 'seed' ? report.blocked : report.evacuated.vcpus).toBeGreaterThan(0);
    expect(guest.image()).toBe(before);
    expect(guest.hypervisor.trappedFrames).toEqual([]);
    expect(journal.outstanding).toBe(0);
    serve(guest.hypervisor, engine, () => guest.report().streams.every(({ count }) => count > 0n));
    expect(guest.wrongStreams()).toEqual([]);
    expect(guest.report().integrity.mismatches).toBe(0n);
    expect(guest.report().bugCheck).toBeUndefined();
  },
);

import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { beforeEach, describe, expect, test } from 'vitest';
import type { MemtablesError } from '../../src/errors.js';
import { createHeartbeat, Heartbeat, Watchdog } from '../../src/libvmi/watchdog.js';

const LIMIT_MS = 1000;

describe('the watchdog', () => {
  let heartbeat: Heartbeat;
  let watchdog: Watchdog;
  let stuck: MemtablesError[];

  beforeEach(() => {
    const buffer = createHeartbeat();
    stuck = [];
    heartbeat = new Heartbeat(buffer);
    watchdog = new Watchdog(buffer, { limitMs: LIMIT_MS }, (error) => stuck.push(error));
    // The tests look by hand.
    watchdog.stop();
  });

  function lookAt(...times: number[]): void {
    for (const time of times) watchdog.look(time);
  }

  test('names a call that does not return, once', () => {
    heartbeat.enter('vmi_resume_vm', 0);
    lookAt(0, 1000, 1001, 2000, 90_000);
    expect(stuck).toHaveLength(1);
    expect(stuck[0]).toMatchObject({ code: 'HYPERVISOR_STUCK', context: { call: 'vmi_resume_vm' } });
  });

  test('is quiet while nothing is called, however long', () => {
    lookAt(0, 1_000_000);
    heartbeat.enter('vmi_read_pa', 0);
    heartbeat.leave();
    lookAt(1_000_001, 9_000_000);
    expect(stuck).toEqual([]);
  });

  test('is quiet about many short calls, even if it always sees the same one', () => {
    for (let time = 0; time < 100_000; time += 900) {
      heartbeat.enter('vmi_read_pa', 0);
      watchdog.look(time);
      heartbeat.leave();
    }
    expect(stuck).toEqual([]);
  });

  test('counts a call from when it is first seen, not from the end of the one before', () => {
    heartbeat.enter('vmi_read_pa', 0);
    lookAt(0);
    heartbeat.leave();
    heartbeat.enter('vmi_read_pa', 0);
    lookAt(5000, 6000);
    expect(stuck).toEqual([]);
    lookAt(6001);
    expect(stuck).toHaveLength(1);
  });

  test('allows a listen its timeout on top of the limit', () => {
    heartbeat.enter('vmi_events_listen', 5000);
    lookAt(0, 6000);
    expect(stuck).toEqual([]);
    lookAt(6001);
    expect(stuck).toHaveLength(1);
  });

  test('is quiet about a listen that keeps handling events', () => {
    heartbeat.enter('vmi_events_listen', 0);
    for (let time = 0; time < 100_000; time += 900) {
      heartbeat.beat();
      watchdog.look(time);
    }
    expect(stuck).toEqual([]);
  });

  test('names the inner call of a handler, and the outer one again after it', () => {
    heartbeat.enter('vmi_events_listen', 50_000);
    heartbeat.enter('vmi_read_pa', 0);
    lookAt(0, 1001);
    heartbeat.leave();
    lookAt(2000, 53_000, 53_001);
    expect(stuck.map(({ context }) => context.call)).toEqual(['vmi_read_pa', 'vmi_events_listen']);
  });

  test('reports the next call that is stuck, too', () => {
    heartbeat.enter('vmi_pause_vm', 0);
    lookAt(0, 2000);
    heartbeat.leave();
    heartbeat.enter('vmi_resume_vm', 0);
    lookAt(3000, 5000);
    expect(stuck.map(({ context }) => context.call)).toEqual(['vmi_pause_vm', 'vmi_resume_vm']);
  });

  test('notices by itself a thread that is blocked', async () => {
    const buffer = createHeartbeat();
    new Heartbeat(buffer).enter('vmi_resume_vm', 0);
    const blocked = new Worker('Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0)', {
      eval: true,
    });
    await once(blocked, 'online');
    const error = await new Promise<MemtablesError>((report) => {
      new Watchdog(buffer, { limitMs: 20 }, report);
    });
    await blocked.terminate();
    expect(error.code).toBe('HYPERVISOR_STUCK');
  });
});

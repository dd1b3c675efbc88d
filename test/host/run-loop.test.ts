import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { EventId } from '../../src/host/kvmi-wire.js';
import { load, nop } from './fake-machine.js';
import { Fixture } from './fixture.js';

const TRAPPED = 0x3000n;
const EXECUTE_ONLY = 4;

let fixture: Fixture;
beforeEach(async () => {
  fixture = await Fixture.attached();
  await fixture.trap(TRAPPED, EXECUTE_ONLY);
});
afterEach(() => fixture.close());

describe('the run loop', () => {
  it('runs the guest, raises its events, and goes on when they are answered', async () => {
    fixture.machine.script(0, nop, load(TRAPPED), load(TRAPPED), nop);
    fixture.start();
    for (let i = 0; i < 2; i++) {
      const event = await fixture.tool.event();
      expect(event.event).toBe(EventId.PF);
      fixture.tool.answer(event);
    }
    while (fixture.machine.retired(0) < 4) await sleep(1);
    expect(fixture.failures).toEqual([]);
  });

  it('runs nothing while every vCPU waits for the tool, and answers its commands', async () => {
    fixture.start();
    await fixture.tool.pauseAll(2);
    const events = [await fixture.tool.event(), await fixture.tool.event()];
    await fixture.sync();
    const { runs } = fixture.machine;
    await sleep(20);
    await fixture.sync();
    expect(fixture.machine.runs).toBe(runs);
    fixture.machine.script(1, nop);
    fixture.tool.answer(events[1]!);
    while (fixture.machine.retired(1) < 1) await sleep(1);
  });

  it('keeps looking at an idle guest, whose timer may be due', async () => {
    fixture.start();
    await sleep(10);
    fixture.machine.script(0, nop);
    while (fixture.machine.retired(0) < 1) await sleep(1);
  });

  it('stops and reports when the machine fails, in a run and in a command', async () => {
    const failure = new Error('triple fault');
    fixture.machine.readPhysical = () => {
      throw failure;
    };
    fixture.tool.read(0n, 8n).catch(() => {});
    while (fixture.failures.length < 1) await sleep(1);
    fixture.machine.run = () => {
      throw failure;
    };
    fixture.start();
    while (fixture.failures.length < 2) await sleep(1);
    await sleep(10);
    expect(fixture.failures).toEqual([failure, failure]);
  });
});

import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { EventId, PageAccess } from '../../src/host/kvmi-wire.js';
import { load } from './fake-machine.js';
import { Fixture } from './fixture.js';

const TRAPPED = 0x3000n;

let fixture: Fixture;
/** Milliseconds. */
let clock = 0;

beforeEach(async () => {
  vi.spyOn(performance, 'now').mockImplementation(() => clock);
  fixture = await Fixture.attached();
  await fixture.trap(TRAPPED, PageAccess.EXECUTE);
});
afterEach(() => {
  fixture.close();
  vi.restoreAllMocks();
});

/** A page fault that is sent and answered at these times. */
async function pageFault(sent: number, answered: number, vcpu = 0): Promise<void> {
  fixture.machine.script(vcpu, load(TRAPPED));
  clock = sent;
  fixture.turn();
  const event = await fixture.tool.event();
  clock = answered;
  fixture.tool.answer(event);
  await fixture.sync();
}

const times = () => fixture.introspection.times.report();

describe('the times of page faults', () => {
  it('the tool has an event until its answer comes, the host the time until the next one', async () => {
    await pageFault(10, 17);
    expect(times()).toEqual({ answered: 1, turnaroundNs: 7e6, followed: 0, hostNs: 0 });
    await pageFault(20, 20.5);
    expect(times()).toEqual({ answered: 2, turnaroundNs: 7.5e6, followed: 1, hostNs: 3e6 });
  });

  it('an event that is not answered yet counts as neither', async () => {
    await pageFault(1, 2);
    fixture.machine.script(0, load(TRAPPED));
    clock = 4;
    fixture.turn();
    clock = 1000;
    expect(times()).toEqual({ answered: 1, turnaroundNs: 1e6, followed: 1, hostNs: 2e6 });
  });

  it('each vCPU is timed by itself', async () => {
    await pageFault(1, 2, 0);
    await pageFault(10, 20, 1);
    await pageFault(50, 51, 0);
    expect(times()).toEqual({ answered: 3, turnaroundNs: 12e6, followed: 1, hostNs: 48e6 });
  });

  it('a pause is nobody’s time', async () => {
    await pageFault(1, 2);
    await fixture.tool.pauseAll(2);
    for (let vcpu = 0; vcpu < 2; vcpu++) {
      const event = await fixture.tool.event();
      expect(event.event).toBe(EventId.PAUSE_VCPU);
      clock = 500;
      fixture.tool.answer(event);
    }
    await fixture.sync();
    await pageFault(600, 601);
    expect(times()).toEqual({ answered: 2, turnaroundNs: 2e6, followed: 0, hostNs: 0 });
  });

  it('nor is the time between two tools', async () => {
    await pageFault(1, 2);
    const again = fixture.tool.accept();
    fixture.tool.hangUp();
    await again;
    await fixture.tool.enable(0, EventId.PF);
    await fixture.tool.setAccess({ gpa: TRAPPED, access: PageAccess.EXECUTE });
    await pageFault(1000, 1001);
    expect(times()).toEqual({ answered: 2, turnaroundNs: 2e6, followed: 0, hostNs: 0 });
  });
});

import { expect, test } from 'vitest';
import { EmbeddedGuest } from '../support/embedded-guest.js';

const HOOK = 'nt!RtlGetVersion';
const RUN = 500;

/** A running guest whose list of processes can be left as a change leaves it that is not over yet. */
function guestWithBreakableList(unloadSeconds: number) {
  const guest = EmbeddedGuest.boot({ vcpus: 1 });
  const attached = guest.attach({ unloadSeconds });
  const head = attached.kernel.symbol('PsActiveProcessHead');
  const blink = guest.loaded.translate(attached.kernel.memory.readU64(head))! + 8n;
  const whole = guest.machine.readPhysical(blink, 8);
  /** `listens`: how often the guest runs until the change is over. */
  const breakList = (listens: number) => {
    guest.machine.writePhysical(blink, Buffer.alloc(8));
    let left = listens;
    guest.hypervisor.advance = (machine) => {
      if (left-- === 1) mendList();
      return machine.run(RUN).traps;
    };
  };
  const mendList = () => guest.machine.writePhysical(blink, whole);
  return { guest, ...attached, breakList, mendList };
}

test('a hook and an unload wait until the change of a list is over', () => {
  const { guest, engine, events, breakList } = guestWithBreakableList(20);
  const before = guest.image();
  breakList(5);
  engine.hook(HOOK);
  expect(guest.image()).not.toBe(before);
  breakList(5);
  expect(engine.unload().blocked).toBeGreaterThan(0);
  expect(events).toContainEqual({
    type: 'unload-blocked',
    where: expect.arrayContaining([expect.stringContaining('the list of processes is broken')]),
  });
  expect(guest.image()).toBe(before);
});

test('a list that never adds up refuses a hook as in use, and blocks an unload', () => {
  const { guest, engine, breakList, mendList } = guestWithBreakableList(0.1);
  const before = guest.image();
  breakList(Number.POSITIVE_INFINITY);
  expect(() => engine.hook(HOOK)).toThrow(
    expect.objectContaining({ code: 'HOOK_REFUSED', context: expect.objectContaining({ reason: 'in-use' }) }),
  );
  expect(guest.image()).toBe(before);
  mendList();
  engine.hook(HOOK);
  breakList(Number.POSITIVE_INFINITY);
  expect(() => engine.unload()).toThrow(expect.objectContaining({ code: 'UNLOAD_BLOCKED' }));
});

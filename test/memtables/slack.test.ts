import { expect, test } from 'vitest';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { handlerAt, handlersOf, hookAll, relocations, serve, stepInto } from './relocated-guest.js';

/** Leaves this much slack at the end of .text, and none anywhere else. */
function guestWithSlack(bytes: number) {
  const guest = EmbeddedGuest.boot({ seed: 51 });
  guest.spoilSlack();
  const { rva, virtualSize } = guest.peSection('.text');
  const pageEnd = Math.ceil((rva + virtualSize) / 4096) * 4096;
  const gpa = guest.loaded.translate(guest.loaded.kernelBase + BigInt(pageEnd - bytes - 1))!;
  guest.machine.writePhysical(gpa, Buffer.concat([Buffer.from([1]), Buffer.alloc(bytes)]));
  return guest;
}

test('loads that find no slack stay where they are, with the reason; the others are relocated', () => {
  const guest = guestWithSlack(700);
  const before = guest.image();
  const { engine, events } = guest.attach({ threshold: 2 });
  hookAll(guest, engine);
  engine.relocating = true;
  serve(guest.hypervisor, engine, () => (engine.statistics().refused['no-slack'] ?? 0) > 10);
  expect(relocations(events).length).toBeGreaterThan(0);
  // Of what is left, no load takes more than it needs.
  for (const { encoder, passedOver } of relocations(events)) {
    // The seed is taken where nothing else is possible, or no other has room.
    const reasons = encoder === 'seed' ? ['register-not-in-frame', 'no-slack'] : ['too-little-slack'];
    expect(Object.values(passedOver).some((reason) => reasons.includes(reason))).toBe(true);
  }
  expect(engine.statistics().slack.free).toBeLessThan(700);
  engine.unload();
  expect(guest.wrongStreams()).toEqual([]);
  expect(guest.image()).toBe(before);
});

test('slack that somebody has used since is not written over, and what lies behind it still is', () => {
  const guest = guestWithSlack(3000);
  const { engine, kernel, events } = guest.attach({ threshold: 2 });
  hookAll(guest, engine);
  const { rva, virtualSize } = guest.peSection('.text');
  const pageEnd = Math.ceil((rva + virtualSize) / 4096) * 4096;
  // The next handler would begin before it.
  const used =
    kernel.base +
    BigInt(pageEnd - 3000 + (engine.statistics().slack.bytes - engine.statistics().slack.free) + 20);
  guest.machine.writePhysical(guest.loaded.translate(used)!, Buffer.from([0x42]));
  engine.relocating = true;
  serve(guest.hypervisor, engine, () => engine.statistics().tableLoads > 3000);
  expect(kernel.memory.readU8(used)).toBe(0x42);
  expect(relocations(events).length).toBeGreaterThan(0);
  expect(handlersOf(events).every(({ gva }) => gva > used)).toBe(true);
  engine.unload();
  expect(guest.wrongStreams()).toEqual([]);
  expect(kernel.memory.readU8(used)).toBe(0x42);
});

test("once NT's slack is used up, its switches run in that of the HAL, and leave nothing there", () => {
  const guest = EmbeddedGuest.boot({ seed: 53 });
  guest.spoilSlack(['nt']);
  const before = guest.image();
  const { base, size } = guest.loaded.hal;
  const isInHal = (gva: bigint) => gva >= base && gva < base + BigInt(size);
  const { engine, events } = guest.attach({ threshold: 2 });
  hookAll(guest, engine);
  engine.relocating = true;
  serve(guest.hypervisor, engine, () => relocations(events).length >= 20);
  expect(handlersOf(events).every(({ gva }) => isInHal(gva))).toBe(true);
  engine.relocating = false;
  guest.stopTimer();
  stepInto(guest, 0, (rip) => handlerAt(events, rip));
  expect(isInHal(guest.machine.registers(0).rip)).toBe(true);
  guest.startTimer();
  engine.unload();
  expect(guest.wrongStreams()).toEqual([]);
  expect(guest.image()).toBe(before);
  expect(engine.statistics().slack.free).toBe(engine.statistics().slack.bytes);
});

import { describe, expect, onTestFinished, test, vi } from 'vitest';
import { encodeJump } from '../../src/handlers/jump.js';
import { FunctionTable } from '../../src/nt/pdata.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { preemptAt, relocations, serve, stepInto, stepOnce } from './relocated-guest.js';

const NAME = 'NtCreateFile';
/** The first instruction has four bytes: a jump covers the second one too. */
const INTERIOR = 4n;

function refusal(reason: string) {
  return expect.objectContaining({ code: 'HOOK_REFUSED', context: expect.objectContaining({ reason }) });
}

/** A stepped guest whose vCPU stands inside the bytes that a hook on `NAME` replaces. */
function guestInsideTarget() {
  const guest = EmbeddedGuest.boot({ vcpus: 1, seed: 41 });
  const attached = guest.attach();
  guest.stopTimer();
  const interior = attached.kernel.symbol(NAME) + INTERIOR;
  stepInto(guest, 0, (rip) => (rip === interior ? rip : undefined));
  return { guest, interior, ...attached };
}

describe('a hook that cannot be placed is refused with the reason, and the guest is as it was', () => {
  const cases: (readonly [name: string, expected: unknown])[] = [
    ['nt!NoSuchFunction', expect.objectContaining({ code: 'SYMBOL_NOT_FOUND' })],
    ['NtCreateFile', expect.objectContaining({ code: 'INVALID_ARGUMENT' })],
    ['nt!', expect.objectContaining({ code: 'INVALID_ARGUMENT' })],
    ['nt!PsInitialSystemProcess', refusal('not-code')],
    ['nt!NtQueryEaFile', refusal('pageable')],
    ['nt!HalInitSystem', refusal('discardable')],
    ['nt!KdInitSystem', refusal('initialisation-code')],
    ['nt!KiPageFaultShadow', refusal('mapped-for-user-mode')],
    ['nt!KeQueryTickCount', refusal('call')],
    ['nt!RtlFillMemoryUlong', refusal('branch-target')],
    ['nt!KeGetCurrentIrqlTest', refusal('too-short')],
    ['nt!KeGetRecommendedSharedDataAlignment', refusal('too-short')],
  ];

  test.each(cases)('%s', (name, expected) => {
    const guest = EmbeddedGuest.boot({ vcpus: 1 });
    const before = guest.image();
    const { engine, journal } = guest.attach();
    expect(() => engine.hook(name)).toThrow(expected as Error);
    expect(guest.image()).toBe(before);
    expect(guest.hypervisor.trappedFrames).toEqual([]);
    expect(journal.outstanding).toBe(0);
    expect(engine.statistics().slack.free).toBe(engine.statistics().slack.bytes);
  });

  test('the list of the guest build has the same reasons', () => {
    const { sites } = EmbeddedGuest.boot({ vcpus: 1 }).artefacts;
    for (const { function: name, reason } of sites.unhookable) {
      expect(cases.find(([hook]) => hook === `nt!${name}`)?.[1]).toEqual(refusal(reason));
    }
  });

  test('a function that is hooked already', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 1 });
    const { engine } = guest.attach();
    engine.hook(`nt!${NAME}`);
    const image = guest.image();
    expect(() => engine.hook(`nt!${NAME}`)).toThrow(refusal('hooked-already'));
    expect(guest.image()).toBe(image);
    engine.unload();
  });

  test('a function one of whose parts, moved elsewhere by the compiler, jumps back into its first bytes', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 1 });
    const { engine, kernel } = guest.attach();
    // A function that nothing calls plays the part.
    const cold = kernel.symbolRva('RtlGetVersion');
    const jump = encodeJump(kernel.base + BigInt(cold), kernel.symbol(NAME) + INTERIOR)!;
    guest.machine.writePhysical(guest.loaded.translate(kernel.base + BigInt(cold))!, jump);
    const fragments = vi
      .spyOn(FunctionTable.prototype, 'fragmentsOf')
      .mockImplementation((entry) => [entry, { begin: cold, end: cold + jump.length, unwind: 0 }]);
    onTestFinished(() => fragments.mockRestore());
    const before = guest.image();
    expect(() => engine.hook(`nt!${NAME}`)).toThrow(refusal('branch-target'));
    expect(guest.image()).toBe(before);
  });

  test('a function whose first bytes a vCPU never leaves', () => {
    const { guest, engine } = guestInsideTarget();
    const before = guest.image();
    guest.hypervisor.advance = () => [];
    expect(() => engine.hook(`nt!${NAME}`)).toThrow(refusal('in-use'));
    expect(guest.image()).toBe(before);
    expect(guest.hypervisor.trappedFrames).toEqual([]);
  });

  test('no slack is left', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 1 });
    guest.spoilSlack();
    const before = guest.image();
    const { engine } = guest.attach();
    expect(engine.statistics().slack.bytes).toBe(0);
    expect(() => engine.hook(`nt!${NAME}`)).toThrow(expect.objectContaining({ code: 'SLACK_EXHAUSTED' }));
    expect(guest.image()).toBe(before);
  });
});

describe('a hook is placed only when nothing stands in the bytes it replaces', () => {
  test('it waits for the vCPU inside them', () => {
    const { guest, interior, engine, kernel } = guestInsideTarget();
    const original = Buffer.from(kernel.memory.read(interior - INTERIOR, 5));
    guest.hypervisor.advance = () => {
      // Nothing may have been written while it stands there.
      if (guest.machine.registers(0).rip === interior) {
        expect(Buffer.from(kernel.memory.read(interior - INTERIOR, 5))).toEqual(original);
      }
      stepOnce(guest, 0);
      return [];
    };
    engine.hook(`nt!${NAME}`);
    expect(kernel.memory.readU8(interior - INTERIOR)).toBe(0xe9);
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    guest.startTimer();
    serve(guest.hypervisor, engine, () => engine.statistics().violations > 1000);
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
  });

  test('it waits for the thread that was preempted inside them', () => {
    const { guest, interior, engine, kernel } = guestInsideTarget();
    preemptAt(guest, kernel, 0, (rip) => (rip === interior ? rip : undefined));
    guest.hypervisor.advance = () => [];
    expect(() => engine.hook(`nt!${NAME}`)).toThrow(refusal('in-use'));
    expect(kernel.memory.readU8(interior - INTERIOR)).not.toBe(0xe9);
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    guest.startTimer();
    engine.hook(`nt!${NAME}`);
    serve(guest.hypervisor, engine, () => engine.statistics().violations > 1000);
    engine.unload();
    expect(guest.wrongStreams()).toEqual([]);
  });
});

describe('a hook is taken out only when nothing is inside its trampoline', () => {
  test('unload is blocked while a vCPU is inside it, and then succeeds', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 1, seed: 42 });
    const before = guest.image();
    const { engine, events } = guest.attach();
    engine.hook(`nt!${NAME}`);
    const hooked = events.find((event) => event.type === 'hooked')!;
    guest.stopTimer();
    const inside = (rip: bigint) => rip >= hooked.trampoline && rip < hooked.trampoline + 32n;
    stepInto(guest, 0, (rip) => (inside(rip) ? rip : undefined));
    guest.hypervisor.advance = () => {
      stepOnce(guest, 0);
      return [];
    };
    const report = engine.unload();
    expect(report.blocked).toBeGreaterThan(0);
    expect(guest.image()).toBe(before);
    guest.startTimer();
    guest.hypervisor.advance = (machine) => machine.run(500).traps;
    guest.hypervisor.listen(5);
    expect(guest.wrongStreams()).toEqual([]);
    expect(relocations(events)).toEqual([]);
  });
});

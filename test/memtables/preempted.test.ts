import { setImmediate } from 'node:timers/promises';
import { describe, expect, test, vi } from 'vitest';
import type { EngineEvent } from '../../src/memtables/report.js';
import type { Kernel } from '../../src/nt/kernel.js';
import { scanGuest } from '../../src/safety/scan.js';
import { TrapFrame } from '../../src/safety/trap-frame.js';
import type { Gva } from '../../src/vmi/address.js';
import { whileQuiescent } from '../../src/vmi/quiescence.js';
import { decodeInstruction, gprName } from '../../src/x86/instruction.js';
import type { GprName } from '../../src/x86/registers.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';
import { freeRunning } from '../support/machine-hypervisor.js';
import {
  boundariesOf,
  handlerAt,
  handlersOf,
  hookAll,
  preemptAt,
  rangeOf,
  relocatedGuest,
  relocations,
  runSwitches,
  serve,
  stepInto,
  stepOnce,
} from './relocated-guest.js';

const SITES = 20;
const SWITCHES_AFTERWARDS = 2000n;
const MOST_ROUNDS = 60;
/** Longer than values that are no RIP count. */
const SECONDS = 2;
const VOLATILE: ReadonlySet<GprName> = new Set(['rax', 'rcx', 'rdx', 'r8', 'r9', 'r10', 'r11']);

/** The registers of a table load that was relocated. */
function registersOf(kernel: Kernel, site: Gva): { dst: GprName; idx: GprName } {
  const { operands } = decodeInstruction(kernel.image.read(Number(site - kernel.base), 15), site)!;
  const [to, from] = operands;
  if (to?.kind !== 'register' || from?.kind !== 'memory') throw new Error('a load has other operands');
  return { dst: gprName(to.register), idx: gprName(from.index) };
}

/**
 * Finds the name of the instruction of a handler at an address: those of its header have one each, those of blocks that
 * are alike share one; handlers that compute the block's address in the index are named apart. Only of those handlers
 * whose registers a trap frame holds, as in real code.
 */
function instructionsOf(events: readonly EngineEvent[], kernel: Kernel) {
  const places = new Map<Gva, Map<number, string>>();
  for (const handler of handlersOf(events)) {
    if (!kernel.contains(handler.site)) continue;
    const { dst, idx } = registersOf(kernel, handler.site);
    if (!VOLATILE.has(dst)) continue;
    const address = dst === idx ? 'in the index' : 'apart from the index';
    const named = [...boundariesOf(kernel, handler)].map(([at, name]) => {
      const [part, ...which] = name.split(' ');
      return [at, `${part}, address ${address}: ${which.join(' ')}`] as const;
    });
    places.set(handler.gva, new Map(named));
  }
  const nameAt = (rip: Gva): string | undefined => {
    const inside = handlerAt(events, rip);
    return inside && places.get(inside.gva)?.get(Number(rip - inside.gva));
  };
  return { nameAt, names: [...places.values()].flatMap((names) => [...names.values()]) };
}

/** Nothing runs: who is unloaded from has not had to. */
const standStill = () => [];

/** Those of which the scan says all that there is to say. */
function ripsInHandlers(guest: EmbeddedGuest, kernel: Kernel, events: readonly EngineEvent[]) {
  const ranges = handlersOf(events).map(rangeOf);
  const scan = whileQuiescent(guest.hypervisor, () => scanGuest(guest.hypervisor, kernel, ranges));
  return scan.unsettled.length > 0 ? [] : scan.findings.filter(({ isRip }) => isRip);
}

/** The guest goes on and computes what it did. */
function expectToGoOn(guest: EmbeddedGuest): void {
  runSwitches(guest, SWITCHES_AFTERWARDS);
  expect(guest.wrongStreams()).toEqual([]);
  expect(guest.report().bugCheck).toBeUndefined();
}

describe.each(['lean', 'fused'] as const)('a thread preempted in a %s handler', (handler) => {
  test.each([
    'header, address apart from the index',
    'block, address apart from the index',
    'header, address in the index',
    'block, address in the index',
  ])(
    'is moved out of it, whatever instruction it stands at, and goes on as if it had run to its end: %s',
    async (kind) => {
      const guest = EmbeddedGuest.boot({ vcpus: 1 });
      const before = guest.image();
      const done = new Set<string>();
      for (let round = 0; round < MOST_ROUNDS; round++) {
        // The test runner wants to hear from its worker.
        await setImmediate();
        guest.startTimer();
        guest.hypervisor.advance = freeRunning;
        const { engine, kernel, events, journal } = guest.attach({ threshold: 2, handler });
        hookAll(guest, engine);
        engine.relocating = true;
        serve(guest.hypervisor, engine, () => relocations(events).length >= SITES);
        engine.relocating = false;
        const { nameAt, names } = instructionsOf(events, kernel);
        const next = names.find((name) => name.startsWith(kind) && !done.has(name));
        if (next === undefined) {
          engine.unload();
          if (done.size > 1) break;
          continue;
        }
        guest.stopTimer();
        preemptAt(guest, kernel, 0, (rip) => (nameAt(rip) === next ? next : undefined));
        if (ripsInHandlers(guest, kernel, events).length === 1) {
          done.add(next);
          guest.hypervisor.advance = standStill;
          const { evacuated } = engine.unload();
          expect(evacuated, next).toEqual({ vcpus: 0, threads: 1 });
        } else {
          // Another one has been preempted inside as well, or is about to be.
          guest.startTimer();
          engine.unload();
        }
        expect(guest.image()).toBe(before);
        expect(journal.outstanding).toBe(0);
        guest.startTimer();
        expectToGoOn(guest);
      }
      expect(done.size).toBeGreaterThan(1);
    },
  );
});

/** A guest that stands still with one thread inside a handler, preempted at the first instruction of a block. */
function preemptedInBlock(handler: 'lean' | 'seed') {
  const all = relocatedGuest({ vcpus: 1, handler, unloadSeconds: SECONDS });
  const { guest, kernel, events } = all;
  const { nameAt } = instructionsOf(events, kernel);
  for (let tries = 0; tries < MOST_ROUNDS; tries++) {
    preemptAt(guest, kernel, 0, (rip) => nameAt(rip)?.match(/^block.*Mov/) ?? undefined);
    const [found, ...others] = ripsInHandlers(guest, kernel, events);
    if (found === undefined || others.length > 0) continue;
    guest.hypervisor.advance = standStill;
    return { ...all, found, frame: TrapFrame.of(kernel, found)! };
  }
  throw new Error('there is always another one inside as well');
}

/** What the guest holds at `gva`; `put` writes there. */
function quadword(guest: EmbeddedGuest, gva: Gva) {
  const gpa = guest.loaded.translate(gva)!;
  const bytes = Buffer.from(guest.machine.readPhysical(gpa, 8));
  const put = (value: bigint) => {
    const written = Buffer.alloc(8);
    written.writeBigUInt64LE(value);
    guest.machine.writePhysical(gpa, written);
  };
  return { value: bytes.readBigUInt64LE(), put };
}

describe('a preempted thread is left where it is', () => {
  const expectToWait = ({ guest, engine, found }: ReturnType<typeof preemptedInBlock>) => {
    expect(() => engine.unload()).toThrow(expect.objectContaining({ code: 'UNLOAD_BLOCKED' }));
    expect(quadword(guest, found.where!).value).toBe(found.value);
  };

  test('for as long as its registers may come back from a copy of its frame', () => {
    const all = preemptedInBlock('lean');
    const { guest, engine, before, found, frame } = all;
    // As in a CONTEXT, among what its context switch has saved.
    const inContext = { rsp: found.where! - 0x300n, rip: found.where! - 0x300n + 0x60n };
    const saved = { rsp: quadword(guest, inContext.rsp), rip: quadword(guest, inContext.rip) };
    saved.rsp.put(frame.registers.rsp);
    saved.rip.put(frame.registers.rip);
    expectToWait(all);
    saved.rsp.put(saved.rsp.value);
    saved.rip.put(saved.rip.value);
    expect(engine.unload().evacuated).toEqual({ vcpus: 0, threads: 1 });
    expect(guest.image()).toBe(before);
    guest.startTimer();
    expectToGoOn(guest);
  });

  test('while the kernel debugger has stopped the guest, and has copies elsewhere', () => {
    const all = preemptedInBlock('lean');
    const { guest, engine, kernel, before } = all;
    const FLAG = 'KdEnteredDebugger';
    const { profile } = kernel;
    const [hasSymbol, symbol] = [profile.hasSymbol.bind(profile), profile.symbol.bind(profile)];
    // The image begins with MZ.
    vi.spyOn(profile, 'hasSymbol').mockImplementation((name) => name === FLAG || hasSymbol(name));
    vi.spyOn(profile, 'symbol').mockImplementation((name) => (name === FLAG ? 0 : symbol(name)));
    expectToWait(all);
    vi.restoreAllMocks();
    expect(engine.unload().evacuated).toEqual({ vcpus: 0, threads: 1 });
    expect(guest.image()).toBe(before);
    guest.startTimer();
    expectToGoOn(guest);
  });

  test('in a handler that keeps registers on the stack', () => {
    const all = preemptedInBlock('seed');
    const { guest, engine, before } = all;
    expectToWait(all);
    guest.startTimer();
    guest.hypervisor.advance = freeRunning;
    expect(engine.unload().evacuated).toEqual({ vcpus: 0, threads: 0 });
    expect(guest.image()).toBe(before);
    expectToGoOn(guest);
  });
});

describe('what a vCPU has interrupted in a handler', () => {
  test.each([50, 70, 90, 110])(
    'is moved out of it while the interrupt is handled, after %i instructions',
    (instructions) => {
      const { guest, before, engine, kernel, events } = relocatedGuest({ vcpus: 1, handler: 'lean' });
      const { nameAt } = instructionsOf(events, kernel);
      // Where the frame is being taken down already, there is nothing to change but RIP.
      const isSettled = () => {
        const [found, ...others] = ripsInHandlers(guest, kernel, events);
        const frame = found && TrapFrame.of(kernel, found);
        return others.length === 0 && frame?.registers.rax !== undefined;
      };
      do {
        stepInto(guest, 0, nameAt);
        guest.tick(0);
        for (let step = 0; step < instructions; step++) stepOnce(guest, 0);
      } while (!isSettled());
      guest.hypervisor.advance = standStill;
      expect(engine.unload().evacuated).toEqual({ vcpus: 0, threads: 1 });
      expect(guest.image()).toBe(before);
      guest.startTimer();
      expectToGoOn(guest);
    },
  );
});

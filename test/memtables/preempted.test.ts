import { describe, expect, test } from 'vitest';
import type { EngineEvent } from '../../src/memtables/report.js';
import type { Kernel } from '../../src/nt/kernel.js';
import { scanGuest } from '../../src/safety/scan.js';
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
  type Relocated,
  rangeOf,
  relocations,
  serve,
} from './relocated-guest.js';

const SITES = 12;
const SWITCHES_AFTERWARDS = 2000n;
const MOST_ROUNDS = 60;
const VOLATILE: ReadonlySet<GprName> = new Set(['rax', 'rcx', 'rdx', 'r8', 'r9', 'r10', 'r11']);

/** The registers of a table load that was relocated. */
function registersOf(kernel: Kernel, { site }: Relocated): { dst: GprName; idx: GprName } {
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
  for (const relocated of relocations(events)) {
    const { dst, idx } = registersOf(kernel, relocated);
    if (!VOLATILE.has(dst) || !VOLATILE.has(idx)) continue;
    const kind = dst === idx ? 'in the index' : 'apart';
    for (const handler of relocated.handlers) {
      const named = [...boundariesOf(kernel, handler)].map(([at, name]) => [at, `${kind}: ${name}`] as const);
      places.set(handler.gva, new Map(named));
    }
  }
  const nameAt = (rip: Gva): string | undefined => {
    const inside = handlerAt(events, rip);
    return inside && places.get(inside.gva)?.get(Number(rip - inside.gva));
  };
  return { nameAt, names: [...places.values()].flatMap((names) => [...names.values()]) };
}

/** Nothing runs: who is unloaded from has not had to. */
const standStill = () => [];

function ripsInHandlers(guest: EmbeddedGuest, kernel: Kernel, events: readonly EngineEvent[]) {
  const ranges = handlersOf(events).map(rangeOf);
  const scan = whileQuiescent(guest.hypervisor, () => scanGuest(guest.hypervisor, kernel, ranges));
  return scan.findings.filter(({ isRip }) => isRip);
}

/** The guest goes on and computes what it did. */
function expectToGoOn(guest: EmbeddedGuest): void {
  const { switches } = guest.report();
  while (guest.report().switches['one-level'] < switches['one-level'] + SWITCHES_AFTERWARDS)
    guest.machine.run(500);
  expect(guest.wrongStreams()).toEqual([]);
  expect(guest.report().bugCheck).toBeUndefined();
}

describe.each(['lean', 'fused'] as const)('a thread preempted in a %s handler', (handler) => {
  test('is moved out of it, whatever instruction it stands at, and goes on as if it had run to its end', () => {
    const guest = EmbeddedGuest.boot({ vcpus: 1 });
    const before = guest.image();
    const done = new Set<string>();
    for (let round = 0; round < MOST_ROUNDS; round++) {
      guest.startTimer();
      guest.hypervisor.advance = freeRunning;
      const { engine, kernel, events, journal } = guest.attach({ threshold: 2, handler });
      hookAll(guest, engine);
      engine.relocating = true;
      serve(guest.hypervisor, engine, () => relocations(events).length >= SITES);
      engine.relocating = false;
      const { nameAt, names } = instructionsOf(events, kernel);
      const next = names.find((name) => !done.has(name));
      if (next === undefined) break;
      guest.stopTimer();
      preemptAt(guest, kernel, 0, (rip) => (nameAt(rip) === next ? next : undefined));
      if (ripsInHandlers(guest, kernel, events).length === 1) {
        done.add(next);
        guest.hypervisor.advance = standStill;
        const { evacuated } = engine.unload();
        expect(evacuated, next).toEqual({ vcpus: 0, threads: 1 });
      } else {
        // Another one has been preempted inside as well.
        guest.startTimer();
        engine.unload();
      }
      expect(guest.image()).toBe(before);
      expect(journal.outstanding).toBe(0);
      guest.startTimer();
      expectToGoOn(guest);
    }
    expect(done.size).toBeGreaterThan(7);
  });
});

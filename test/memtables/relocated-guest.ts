import type { HandlerChoice } from '../../src/handlers/planner.js';
import type { Engine } from '../../src/memtables/engine.js';
import type { EngineEvent, Handler } from '../../src/memtables/report.js';
import type { Kernel } from '../../src/nt/kernel.js';
import { findProcessor } from '../../src/nt/processors.js';
import { type LiveRange, scanGuest } from '../../src/safety/scan.js';
import type { Hypervisor } from '../../src/vmi/hypervisor.js';
import { Disassembler, FlowControl, Mnemonic } from '../../src/x86/instruction.js';
import { EmbeddedGuest } from '../support/embedded-guest.js';

export type Relocated = Extract<EngineEvent, { type: 'relocated' }>;

const MOST_STEPS = 2_000_000;
const STEPS_PER_TICK = 20_000;
/** Enough for an interrupt, a DPC and a context switch. */
const STEPS_TO_SWITCH = 5000;
/** From the change of the current thread to the new thread's own stack. */
const STEPS_OUT_OF_SWITCH = 40;
const MOST_TRIES = 100;
const MOST_RUNS = 10_000;

/** Lets guest and engine work until `done`, for a bounded number of listens. */
export function serve(
  hypervisor: Pick<Hypervisor, 'listen'>,
  engine: Engine,
  done: () => boolean,
  listens = 60_000,
): void {
  for (let i = 0; i < listens; i++) {
    if (done()) return;
    hypervisor.listen(1);
    workAll(engine);
  }
  throw new Error('this took too long');
}

/** Lets the guest run freely until it has executed so many more switches of one level. */
export function runSwitches(guest: EmbeddedGuest, count: bigint): void {
  const executed = () => guest.report().switches['one-level'];
  const end = executed() + count;
  for (let runs = 0; executed() < end; runs++) {
    if (runs === MOST_RUNS) throw new Error('the guest does not go on');
    guest.machine.run(500);
  }
}

/** Lets the engine do all that is queued now. */
export function workAll(engine: Engine): void {
  while (engine.hasWork) engine.work();
}

export function relocations(events: readonly EngineEvent[]): Relocated[] {
  return events.filter((event): event is Relocated => event.type === 'relocated');
}

export function hookAll(guest: EmbeddedGuest, engine: Engine): void {
  for (const name of guest.artefacts.sites.defaultHooks) engine.hook(`nt!${name}`);
}

/** A guest with every default hook and ten relocated loads; from now on it only runs as it is stepped. */
export function relocatedGuest(
  options: { vcpus?: number; seed?: number; unloadSeconds?: number; handler?: HandlerChoice } = {},
) {
  const guest = EmbeddedGuest.boot(options);
  const before = guest.image();
  const attached = guest.attach({
    threshold: 2,
    ...(options.handler === undefined ? {} : { handler: options.handler }),
    ...(options.unloadSeconds === undefined ? {} : { unloadSeconds: options.unloadSeconds }),
  });
  hookAll(guest, attached.engine);
  attached.engine.relocating = true;
  serve(guest.hypervisor, attached.engine, () => relocations(attached.events).length >= 10);
  attached.engine.relocating = false;
  guest.stopTimer();
  return { guest, before, ...attached };
}

export function handlersOf(events: readonly EngineEvent[]): Handler[] {
  return relocations(events).flatMap(({ handlers }) => handlers);
}

/** The handler that holds `rip`. */
export function handlerAt(events: readonly EngineEvent[], rip: bigint): Handler | undefined {
  return handlersOf(events).find(({ gva, bytes }) => rip >= gva && rip < gva + BigInt(bytes));
}

export function rangeOf({ gva, bytes }: Handler): LiveRange {
  return { start: gva, end: gva + BigInt(bytes), owner: 'x' };
}

/**
 * The instructions of a handler by their offset: each of its header's has a name of its own, those of its blocks are
 * named alike.
 */
export function boundariesOf(kernel: Kernel, { gva, bytes }: Handler): Map<number, string> {
  const boundaries = new Map<number, string>();
  const code = new Disassembler(kernel.memory.read(gva, bytes), gva);
  let inHeader = true;
  for (let at = 0; at < bytes; ) {
    const { mnemonic, length, flow } = code.at(at)!;
    if (mnemonic !== Mnemonic.Int3)
      boundaries.set(at, inHeader ? `header ${boundaries.size}` : `block ${Mnemonic[mnemonic]} ${length}`);
    if (flow === FlowControl.IndirectBranch) inHeader = false;
    at += length;
  }
  code.free();
  return boundaries;
}

/** The longest sites are those of two-level switches. */
export const MOST_SITE_BYTES = 32;

/** By the address of each instruction of what a site has become, behind the first: the handler. */
export function insideSites(kernel: Kernel, events: readonly EngineEvent[]): Map<bigint, Handler> {
  return new Map(
    handlersOf(events).flatMap((handler) => {
      const code = kernel.memory.read(handler.site, MOST_SITE_BYTES);
      return [...instructionsOf(code, handler.site)].map((rip) => [rip, handler] as const);
    }),
  );
}

/** Up to an indirect jump. */
export function instructionsOf(bytes: Uint8Array, gva: bigint): Set<bigint> {
  const found = new Set<bigint>();
  const code = new Disassembler(bytes, gva);
  for (let at = 0, last = false; !last; ) {
    const { mnemonic, length } = code.at(at)!;
    if (at > 0) found.add(gva + BigInt(at));
    last = mnemonic === Mnemonic.Jmp;
    at += length;
  }
  code.free();
  return found;
}

/** Runs one instruction, answering what it traps. */
export function stepOnce(guest: EmbeddedGuest, vcpu: number): void {
  const { trap } = guest.machine.step(vcpu, 1);
  if (trap === undefined) return;
  guest.hypervisor.deliver([trap]);
  // A crossing access has further pieces.
  while (guest.hypervisor.listen(0) > 0);
}

/** Steps, with a clock tick now and then, until the vCPU stands at a place that `find` knows. */
export function stepInto<T>(guest: EmbeddedGuest, vcpu: number, find: (rip: bigint) => T | undefined): T {
  for (let steps = 1; steps < MOST_STEPS; steps++) {
    const found = find(guest.machine.registers(vcpu).rip);
    if (found !== undefined) return found;
    if (steps % STEPS_PER_TICK === 0) guest.tick(vcpu);
    stepOnce(guest, vcpu);
  }
  throw new Error('the vCPU does not get there');
}

/** Lets the clock interrupt the vCPU at such a place, until that makes the scheduler pick another thread. */
export function preemptAt<T>(
  guest: EmbeddedGuest,
  kernel: Kernel,
  vcpu: number,
  find: (rip: bigint) => T | undefined,
): T {
  const currentThread = () => findProcessor(kernel, vcpu, guest.machine.registers(vcpu))!.currentThread;
  for (let tries = 0; tries < MOST_TRIES; tries++) {
    const found = stepInto(guest, vcpu, find);
    const { rip } = guest.machine.registers(vcpu);
    const thread = currentThread();
    guest.tick(vcpu);
    for (let steps = 0; steps < STEPS_TO_SWITCH && currentThread() === thread; steps++) stepOnce(guest, vcpu);
    for (let more = 0; more < STEPS_OUT_OF_SWITCH; more++) stepOnce(guest, vcpu);
    // It may have been a DPC that was interrupted, which goes on before the switch.
    const { findings } = scanGuest(guest.hypervisor, kernel, [{ start: rip, end: rip + 1n, owner: 'here' }]);
    if (findings.some(({ isRip, thread: owner }) => isRip && owner?.gva === thread)) return found;
  }
  throw new Error('the thread is never preempted there');
}

// Every table of real binaries, every index, every handler that can replace its loads: executed next to the original.
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import type { HandlerPlan } from '../../src/handlers/plan.js';
import { type Candidate, ENCODERS, planHandlers } from '../../src/handlers/planner.js';
import { PeImage } from '../../src/nt/pe.js';
import { scanImage } from '../../src/switches/scan.js';
import type { FoundSwitch } from '../../src/switches/table.js';
import type { Gva } from '../../src/vmi/address.js';
import type { GprName } from '../../src/x86/registers.js';
import { createFlatMachine, KERNEL_BASE } from '../machine/support.js';
import { type CpuState, differences, STATE_NAMES } from './arena.js';

const BINARIES = [
  'OpenConsole.exe',
  'conpty.dll',
  'winpty-agent.exe',
  'tree-sitter-c.node',
  'lmdb.node',
  'rocksdb.node',
  'koffi.node',
];
const MB = 1024 * 1024;
const IMAGE_GPA = 0x20_0000n;
const STACK_GPA = 0x10_0000n;
const STACK_SIZE = 0x1000;
/** What the handlers with a stack may leave below RSP. */
const DEAD_STACK = 64;
/** More than any handler executes. */
const MOST_STEPS = 32;
const HANDLER_ALIGNMENT = 16n;

const flags = fc.bigInt(0n, (1n << 22n) - 1n).map((bits) => (bits & 0xcd5n) | 2n);
const STARTS = fc.sample(
  fc.record({
    flags,
    values: fc.array(fc.bigInt(0n, (1n << 64n) - 1n), { minLength: 16, maxLength: 16 }),
    rsp: fc.integer({ min: 32, max: STACK_SIZE / 8 - 16 }).map((slot) => BigInt(slot * 8)),
  }),
  { seed: 4, numRuns: 64 },
);

/** A piece of a switch: from one instruction to another, or to wherever its jump leads. */
interface Run {
  readonly from: Gva;
  readonly instructions: number;
  readonly index: GprName;
  readonly entries: number;
}

class Dispatches {
  readonly machine = createFlatMachine({ memoryBytes: 32 * MB });
  readonly base = KERNEL_BASE + IMAGE_GPA;
  readonly image: PeImage;
  readonly original: Buffer;
  /** Behind the image: free for handlers. */
  readonly slack: Gva;

  constructor(path: string) {
    this.image = PeImage.fromFile(readFileSync(path));
    this.original = Buffer.from(this.image.read(0, this.image.sizeOfImage));
    this.machine.writePhysical(IMAGE_GPA, this.original);
    this.slack = this.base + BigInt(Math.ceil(this.original.length / MB) * MB);
  }

  write(gva: Gva, bytes: Uint8Array): void {
    this.machine.writePhysical(gva - KERNEL_BASE, bytes);
  }

  memory(): Buffer {
    return Buffer.from(this.machine.readPhysical(IMAGE_GPA, this.original.length));
  }

  stack(): Buffer {
    return Buffer.from(this.machine.readPhysical(STACK_GPA, STACK_SIZE));
  }

  enter(found: FoundSwitch, run: Run, index: number, number: number): CpuState {
    const { values, flags: rflags, rsp } = STARTS[number % STARTS.length]!;
    const registers = Object.fromEntries(
      STATE_NAMES.map((name, at) => [name, values[at % values.length]!]),
    ) as CpuState;
    const state: CpuState = {
      ...registers,
      rsp: KERNEL_BASE + STACK_GPA + rsp,
      rflags,
      rip: run.from,
      [found.base]: this.base,
      [run.index]: BigInt(index),
    };
    if (found.byteTable !== undefined) Object.assign(state, { [found.byteTable.base]: this.base });
    this.machine.setRegisters(0, state);
    return state;
  }

  state(): CpuState {
    const registers = this.machine.registers(0);
    return Object.fromEntries(STATE_NAMES.map((name) => [name, registers[name]])) as CpuState;
  }

  /** Places all parts of a candidate behind the image; nothing is written. */
  place({ parts }: Candidate): HandlerPlan[] {
    let at = this.slack;
    return parts.map((part) => {
      const plan = part.at(at);
      if (plan.refused !== undefined) throw new Error(plan.refused);
      at = (at + BigInt(part.size) + 2n * HANDLER_ALIGNMENT - 1n) & ~(HANDLER_ALIGNMENT - 1n);
      return plan;
    });
  }
}

function runsOf(found: FoundSwitch, base: Gva): Run[] {
  const { byteTable } = found;
  const dispatch = found.adjacent ? 3 : 1;
  const dword = {
    from: base + BigInt(found.rva),
    instructions: dispatch,
    index: found.index,
    entries: found.entries,
  };
  if (byteTable === undefined) return [dword];
  const standTogether =
    byteTable.rva + byteTable.length === found.rva && byteTable.destination === found.index;
  const byte = {
    from: base + BigInt(byteTable.rva),
    instructions: standTogether ? 1 + dispatch : 1,
    index: byteTable.index,
    entries: byteTable.entries,
  };
  return standTogether ? [byte] : [byte, dword];
}

/** The registers that matter where the switch leads: a handler written over the switch sets only what is live there. */
function expectedDifferences(found: FoundSwitch, name: string, base: Gva, rip: Gva): ReadonlySet<string> {
  const live = name.startsWith('inline') ? found.liveAtCases.get(Number(rip - base)) : undefined;
  if (live === undefined) return new Set();
  const dead = [found.destination, ...(found.byteTable === undefined ? [] : [found.byteTable.destination])];
  return new Set<string>([
    ...dead.filter((register) => !live.registers.has(register)),
    ...(live.flags ? [] : ['rflags']),
  ]);
}

interface Tally {
  runs: number;
  readonly wrong: string[];
}

/** Each index of a switch, through the original and through each handler. */
function compareAll(dispatches: Dispatches, found: FoundSwitch, tally: Record<string, Tally>): void {
  const { base, machine } = dispatches;
  const plannings = ENCODERS.flatMap((encoder) => planHandlers(found, base, encoder));
  for (const planning of plannings) {
    if (planning.refused !== undefined) continue;
    const { name } = planning;
    tally[name] ??= { runs: 0, wrong: [] };
    const plans = dispatches.place(planning);
    for (const run of runsOf(found, base)) {
      for (let index = 0; index < run.entries; index++) {
        const number = index + tally[name].runs;
        const state = dispatches.enter(found, run, index, number);
        machine.step(0, run.instructions);
        const original = dispatches.state();
        const stack = dispatches.stack();

        for (const { handler, site } of plans) {
          dispatches.write(handler.gva, handler.bytes);
          dispatches.write(site.gva, site.bytes);
        }
        dispatches.enter(found, run, index, number);
        let steps = 0;
        do {
          machine.step(0, 1);
          steps++;
        } while (dispatches.state().rip !== original.rip && steps < MOST_STEPS);
        const after = dispatches.state();
        const ignored = expectedDifferences(found, name, base, original.rip);
        const wrong = differences(original, after).filter((text) => !ignored.has(text.split(' ')[0]!));
        const dead = Number(state.rsp - KERNEL_BASE - STACK_GPA);
        const now = dispatches.stack();
        const usesStack = name.startsWith('seed');
        const changed = (from: number, to: number) =>
          Buffer.compare(stack.subarray(from, to), now.subarray(from, to)) !== 0;
        if (changed(0, usesStack ? dead - DEAD_STACK : dead) || changed(dead, STACK_SIZE))
          wrong.push('the stack');
        if (wrong.length > 0) {
          tally[name].wrong.push(`load 0x${found.rva.toString(16)}, index ${index}: ${wrong.join(', ')}`);
        }
        tally[name].runs++;
        dispatches.write(dispatches.slack, Buffer.alloc(Number(endOf(plans) - dispatches.slack)));
        for (const { site } of plans) {
          const at = Number(site.gva - base);
          dispatches.write(site.gva, dispatches.original.subarray(at, at + site.bytes.length));
        }
      }
    }
  }
}

function endOf(plans: readonly HandlerPlan[]): Gva {
  return plans.map(({ handler }) => handler.gva + BigInt(handler.bytes.length)).at(-1)!;
}

describe.each(BINARIES)('%s: whatever replaces a load of it', (binary) => {
  const path = join('.deps/binaries', binary);
  const title = 'leaves registers, flags, memory and RIP as the original does, for every table and index';
  if (!existsSync(path)) {
    it.skip(`${title} (no .deps/binaries: run npm run binaries)`);
    return;
  }
  const dispatches = new Dispatches(path);
  afterAll(() => dispatches.machine.close());

  it(title, () => {
    const tally: Record<string, Tally> = {};
    const switches = scanImage(dispatches.image).filter((site) => site.found);
    for (const found of switches) compareAll(dispatches, found, tally);
    expect(Object.fromEntries(Object.entries(tally).map(([name, { wrong }]) => [name, wrong]))).toEqual(
      Object.fromEntries(Object.keys(tally).map((name) => [name, []])),
    );
    for (const encoder of ENCODERS) {
      const runs = Object.entries(tally).filter(([name]) => name.startsWith(encoder));
      expect(
        runs.reduce((sum, [, each]) => sum + each.runs, 0),
        encoder,
      ).toBeGreaterThan(0);
    }
    expect(Buffer.compare(dispatches.memory(), dispatches.original)).toBe(0);
  });
});

import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { type Analysis, MAX_ENTRIES, type TableLoad } from '../../src/switches/analysis.js';
import { functionAt } from '../../src/switches/functions.js';
import { analyse } from '../../src/switches/interpreter.js';
import type { Registers } from '../../src/x86/registers.js';
import { createFlatMachine, KERNEL_BASE } from '../machine/support.js';
import { assemble, CODE_RVA, type Listing } from './listing.js';
import { FRAME_BYTES, FRAME_POINTER, randomFunction } from './random-function.js';

const machine = createFlatMachine();
afterAll(() => machine.close());

const IMAGE_GPA = 0x10_0000n;
const IMAGE_BASE = KERNEL_BASE + IMAGE_GPA;
const STACK = KERNEL_BASE + 0x20_0000n;
const MOST_INSTRUCTIONS = 120;
const TABLE_ENTRIES = 16n;
const BYTE_ENTRIES = 64n;

/** Numbers on both sides of every bound, of each width. */
const value = fc.oneof(
  { weight: 4, arbitrary: fc.bigInt(0n, 17n) },
  { weight: 1, arbitrary: fc.bigInt(0n, (1n << 64n) - 1n) },
  {
    weight: 3,
    arbitrary: fc
      .tuple(fc.constantFrom(7n, 8n, 15n, 16n, 31n, 32n, 63n, 64n), fc.bigInt(-9n, 9n))
      .map(([bit, near]) => BigInt.asUintN(64, (1n << bit) + near)),
  },
);
const start = fc.record({
  rax: value,
  rcx: value,
  r8: value,
  rdi: value,
  rbp: value,
  frame: fc.array(value, { minLength: FRAME_BYTES / 8 + 1, maxLength: FRAME_BYTES / 8 + 1 }),
});
type Start = typeof start extends fc.Arbitrary<infer T> ? T : never;

/** What the whole property has seen, so that it cannot pass by seeing nothing. */
const seen = { loads: 0, bounded: 0, atTheBound: 0, byteLoads: 0, instructions: 0 };

/** Runs the function from `begin` and compares each instruction on the way with what was found out of it. */
function run({ code, rva }: Listing, analysis: Analysis, begin: Start): void {
  machine.writePhysical(IMAGE_GPA + BigInt(CODE_RVA), code);
  const frame = Buffer.alloc(begin.frame.length * 8);
  begin.frame.forEach((content, n) => {
    frame.writeBigUInt64LE(content, n * 8);
  });
  machine.writePhysical(STACK - KERNEL_BASE, frame);
  const { frame: _, ...registers } = begin;
  machine.setRegisters(0, {
    ...registers,
    rip: IMAGE_BASE + BigInt(rva('f')),
    rsp: STACK,
    [FRAME_POINTER]: STACK,
    rflags: 2n,
  });
  const [first, done] = [rva('f'), rva('done')];
  for (let left = MOST_INSTRUCTIONS; left > 0; left--) {
    const now = machine.registers(0);
    const at = Number(now.rip - IMAGE_BASE);
    if (at === done) return;
    if (at >= first && at < done) {
      seen.instructions++;
      expect(
        analysis.instructions.has(at),
        `an instruction at ${at.toString(16)} that nothing leads to`,
      ).toBe(true);
    }
    const [load, byteLoad] = [analysis.loads.get(at), analysis.byteReads.get(at)];
    if (load !== undefined) {
      seen.loads++;
      if (!check(load, now, TABLE_ENTRIES)) return;
    }
    if (byteLoad !== undefined) {
      seen.byteLoads++;
      if (!check(byteLoad, now, BYTE_ENTRIES)) return;
    }
    const { retired, trap } = machine.step(0, 1);
    if (retired !== 1 || trap !== undefined) return; // a load with a wild address
    if (machine.registers(0).rip < IMAGE_BASE) return;
  }
}

/** Returns whether the load stays inside its table. */
function check(load: TableLoad, registers: Registers, entries: bigint): boolean {
  const index = registers[load.index];
  if (Number.isFinite(load.maxIndex)) {
    if (load.maxIndex < MAX_ENTRIES) seen.bounded++;
    if (index === BigInt(load.maxIndex)) seen.atTheBound++;
    expect(Number(index), `index ${load.index} at ${load.rva.toString(16)}`).toBeLessThanOrEqual(
      load.maxIndex,
    );
  }
  if (load.baseIsImageBase) expect(registers[load.base], load.base).toBe(IMAGE_BASE);
  return index < entries && registers[load.base] === IMAGE_BASE;
}

describe('random functions, executed', () => {
  it('no index exceeds its proven bound, and no base is another than proven', () => {
    fc.assert(
      fc.property(randomFunction, fc.array(start, { minLength: 8, maxLength: 8 }), ({ source }, starts) => {
        const listing = assemble(source, {
          functions: [
            { from: 'f', to: 'end' },
            { from: 'callee', to: 'callee_end' },
          ],
        });
        const code = functionAt(listing.image, listing.functions, listing.rva('f'));
        const analysis = analyse(listing.image, code!);
        if (analysis.outcome !== 'complete') return;
        for (const begin of starts) run(listing, analysis, begin);
      }),
      { numRuns: Number(process.env.MEMTABLES_RANDOM_RUNS ?? 150) },
    );
    expect(seen.instructions).toBeGreaterThan(1000);
    expect(seen.bounded).toBeGreaterThan(30);
    expect(seen.atTheBound).toBeGreaterThan(0);
    expect(seen.loads).toBeGreaterThan(seen.bounded / 2);
    expect(seen.byteLoads).toBeGreaterThan(0);
  });
});

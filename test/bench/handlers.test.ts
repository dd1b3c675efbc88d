import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { describe, expect, onTestFinished, test } from 'vitest';
import { CASES, type Cell, geomeans, MEASURED, ORDERS } from '../../src/bench/handlers/cells.js';
import { FORMS, type Form, indexOf, switchFunction } from '../../src/bench/handlers/switch-code.js';
import { Command } from '../cli/command.js';
import { createFlatMachine, hexBytes } from '../machine/support.js';

const BENCH = fileURLToPath(new URL('../../dist/bench/handlers/main.js', import.meta.url));

if (!existsSync(BENCH)) throw new Error('the benchmark is not built: run `npm run setup`');

function bench(...args: readonly string[]): Command {
  const command = new Command(args, { MEMTABLES_LOG: 'info' }, undefined, BENCH);
  onTestFinished(() => command.kill('SIGKILL'));
  return command;
}

const number = expect.any(Number);

const PLACEMENT = { image: 0x10_0000_0000n, offset: 0x100, handlerOffset: 0x8005 };

describe('bench:handlers', () => {
  test('prints a line for each cell and a summary that other programs can rely on', async () => {
    const command = bench('--json', '--rounds', '1');
    expect([await command.ended, command.stderr]).toEqual([
      0,
      expect.not.stringContaining('handlers-run-code'),
    ]);
    const cells = command.records.slice(0, -1);
    for (const cell of cells) {
      expect(cell).toEqual({
        ...{ type: 'cell', cases: number, encoder: expect.any(String) },
        form: expect.stringMatching(/^(one|two)-level$/),
        order: expect.stringMatching(/^(same|in-turn|random)$/),
        ...{ cyclesUntouched: number, ratioToUntouched: number, ratioToSeed: number, bytes: number },
      });
    }
    const kinds = cells.map(({ form, cases, order, encoder }) => `${form} ${cases} ${order} ${encoder}`);
    expect(new Set(kinds).size).toBe(kinds.length);
    const measured = FORMS.flatMap((form) =>
      CASES.flatMap((cases) =>
        Object.values(MEASURED).filter((handler) => switchFunction(form, cases, handler, PLACEMENT)),
      ),
    );
    expect(kinds.length).toBe(measured.length * ORDERS.length);
    expect(command.records.at(-1)).toEqual({
      type: 'summary',
      geomeanToUntouched: Object.fromEntries(Object.keys(MEASURED).map((name) => [name, number])),
    });
  });

  test('stopped, it leaves no process and says so', async () => {
    const command = bench('--rounds', '1000');
    await command.prints('measuring a one-level switch', 'stderr');
    command.kill('SIGTERM');
    expect(await command.ended).toBe(1);
    expect(command.stderr).toContain('the benchmark was stopped before it was through [BENCH_FAILED]');
  });
});

describe('the figures', () => {
  test('of an encoder are the geometric mean of its own cells', () => {
    const cell = (encoder: Cell['encoder'], ratioToUntouched: number): Cell => ({
      ...{ form: 'one-level', cases: 4, order: 'same', encoder },
      ...{ cyclesUntouched: 1, ratioToUntouched, ratioToSeed: 1, bytes: 1 },
    });
    const means = geomeans([cell('seed', 2), cell('lean', 1), cell('seed', 8), cell('lean', 1)]);
    expect(means.seed).toBeCloseTo(4);
    expect(means.lean).toBe(1);
  });
});

describe('the code', () => {
  test.each(FORMS)('is the same but for the site, %s: what is compared is the handler', (form) => {
    const [untouched, seed] = [undefined, MEASURED.seed].map(
      (each) => switchFunction(form, 4, each, PLACEMENT)!,
    );
    const [before, after] = [untouched!.pieces[0]!.bytes, seed!.pieces[0]!.bytes];
    const changed = [...before.keys()].filter((at) => before[at] !== after[at]);
    const [site, add] = ['4883c604', '4803ca'].map((code) => before.indexOf(hexBytes(code)));
    expect(changed.every((at) => at >= site! + 4 && at < add!)).toBe(true);
    expect(untouched!.handlerBytes).toBe(0);
    const byteHandler = form === 'two-level' ? 47 + 16 * 11 : 0;
    expect(seed!.handlerBytes).toBe(byteHandler + 47 + 4 * 11);
  });

  test.each(
    FORMS.flatMap((form) =>
      [undefined, ...Object.values(MEASURED)]
        .filter((handler) => switchFunction(form, 4, handler, PLACEMENT) !== undefined)
        .map((handler) => ({ form, handler })),
    ),
  )('goes from case to case as it is told: $form, $handler', ({ form, handler }) => {
    const machine = createFlatMachine();
    onTestFinished(() => machine.close());
    const [image, indices, stack, end] = [0x10_0000n, 0x20_0000n, 0x30_0000n, 0x31_0000n];
    const cases = 4;
    const code = switchFunction(form, cases, handler, { ...PLACEMENT, image })!;
    for (const { offset, bytes } of code.pieces) machine.writePhysical(image + BigInt(offset), bytes);
    const order = [3, 0, 2, 1, 1];
    const told = Uint32Array.from(order, (number) => indexOf(form, cases, number));
    machine.writePhysical(indices, new Uint8Array(told.buffer));
    const returnTo = Buffer.alloc(8);
    returnTo.writeBigUInt64LE(end);
    machine.writePhysical(stack, returnTo);
    const start = { rip: image + BigInt(code.offset), rsp: stack, rdx: image, rsi: indices };
    machine.setRegisters(0, { ...start, rdi: BigInt(order.length) });
    const firstCase = code.pieces[0]!.bytes.indexOf(hexBytes('48ffcf 0f85'));
    const visited: number[] = [];
    for (let rip = start.rip; rip !== end; rip = machine.registers(0).rip) {
      const offset = Number(rip - start.rip) - firstCase;
      if (offset >= 0 && offset % 16 === 0 && offset < cases * 16) visited.push(offset / 16);
      expect(machine.step(0, 1).retired).toBe(1);
    }
    expect(visited).toEqual(order);
  });

  test('is none where the handler is refused', () => {
    const refused = (form: Form, cases: number) =>
      Object.entries(MEASURED)
        .filter(([, handler]) => switchFunction(form, cases, handler, PLACEMENT) === undefined)
        .map(([name]) => name);
    expect(refused('one-level', 4)).toEqual([]);
    expect(refused('one-level', 64)).toEqual(['lean-tight']);
    expect(refused('two-level', 4)).toEqual(['lean-dense', 'lean-tight']);
  });
});

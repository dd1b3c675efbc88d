import { ENCODERS, type Encoder } from '../../handlers/planner.js';
import { nextRandom } from '../../random.js';
import type { Gva } from '../../vmi/address.js';
import { median } from '../median.js';
import { runCode } from './run-code.js';
import {
  type Form,
  indexOf,
  type MeasuredHandler,
  type SwitchFunction,
  switchFunction,
} from './switch-code.js';

export const CASES = [4, 8, 16, 64] as const;
export const ORDERS = ['same', 'in-turn', 'random'] as const;
export type Order = (typeof ORDERS)[number];

/** What is measured against the untouched switch: each encoder where slack is no question, and smaller packings. */
export const MEASURED: Readonly<Record<Encoder | 'lean-dense' | 'lean-tight', MeasuredHandler>> = {
  ...(Object.fromEntries(ENCODERS.map((encoder) => [encoder, { encoder }])) as Record<
    Encoder,
    MeasuredHandler
  >),
  'lean-dense': { encoder: 'lean', name: 'lean-dense' },
  'lean-tight': { encoder: 'lean', name: 'lean-tight' },
};
export type MeasuredName = keyof typeof MEASURED;
const NAMES = Object.keys(MEASURED) as MeasuredName[];

export interface Cell {
  readonly form: Form;
  readonly cases: number;
  readonly order: Order;
  readonly encoder: MeasuredName;
  /** Cycles of the time-stamp counter for one untouched switch, with the loop around it. */
  readonly cyclesUntouched: number;
  /** Of the cycles for one switch. */
  readonly ratioToUntouched: number;
  readonly ratioToSeed: number;
  /** The handler's size. */
  readonly bytes: number;
}

/** Far from what else a process has mapped. */
const IMAGE: Gva = 0x10_0000_0000n;
const FUNCTION_SPACE = 0x1_0000;
const HANDLER_SPACE = 0x8000;
/**
 * Where a function and its handler begin in their space. It matters where code lies: slack is not aligned, and has any
 * distance to the code that jumps there.
 */
const PLACEMENTS = [
  [0, 0x215],
  [16, 0x62a],
  [32, 0x93b],
  [48, 0xe40],
] as const;
/** Long enough that the processor cannot learn a random order by heart. */
const SWITCHES = 65_536;

/** Measures every handler of a switch with so many cases, in each order. @throws MemtablesError of `runCode` */
export async function measureCells(
  form: Form,
  cases: number,
  rounds: number,
  signal: AbortSignal,
): Promise<Cell[]> {
  const variants = [undefined, ...NAMES].map((name) => ({
    name,
    functions: [] as SwitchFunction[],
  }));
  let space = 0;
  // In turn, so that what disturbs the machine disturbs all of them.
  const all: SwitchFunction[] = [];
  for (const [offset, handlerOffset] of PLACEMENTS) {
    for (const { name, functions } of variants) {
      const start = space++ * FUNCTION_SPACE;
      const code = switchFunction(form, cases, name && MEASURED[name], {
        image: IMAGE,
        offset: start + offset,
        handlerOffset: start + HANDLER_SPACE + handlerOffset,
      });
      if (code === undefined) continue;
      functions.push(code);
      all.push(code);
    }
  }
  const orders = ORDERS.map((order) => orderOf(order, form, cases));
  // The first round warms up.
  const [, ...measured] = await runCode(IMAGE, all, orders, rounds + 1, signal);
  const [untouched] = variants;
  const seed = variants.find(({ name }) => name === 'seed');
  return ORDERS.flatMap((order, at) => {
    const cycles = (code: SwitchFunction) => measured.map((round) => round[at]![all.indexOf(code)]!);
    const ratio = (variant: typeof untouched, to: typeof untouched) =>
      median(
        variant!.functions.flatMap((code, placement) => {
          const base = cycles(to!.functions[placement]!);
          return cycles(code).map((value, round) => value / base[round]!);
        }),
      );
    return variants.slice(1).flatMap((variant): Cell[] => {
      const [code] = variant.functions;
      if (code === undefined) return [];
      return [
        {
          form,
          cases,
          order,
          encoder: variant.name!,
          cyclesUntouched: median(untouched!.functions.flatMap(cycles)) / SWITCHES,
          ratioToUntouched: ratio(variant, untouched),
          ratioToSeed: ratio(variant, seed),
          bytes: code.handlerBytes,
        },
      ];
    });
  });
}

/** The geometric mean over the cells of each encoder. */
export function geomeans(cells: readonly Cell[]): Partial<Record<MeasuredName, number>> {
  const logarithms = (name: MeasuredName) =>
    cells.filter(({ encoder }) => encoder === name).map((cell) => Math.log(cell.ratioToUntouched));
  return Object.fromEntries(
    NAMES.map((name) => {
      const logs = logarithms(name);
      return [name, Math.exp(logs.reduce((sum, value) => sum + value, 0) / logs.length)];
    }),
  );
}

/** The indices to switch on: of the same sequence of cases in both forms. */
function orderOf(order: Order, form: Form, cases: number): Uint32Array {
  let state = 1;
  return Uint32Array.from({ length: SWITCHES }, (_, at) => {
    state = nextRandom(state);
    if (order === 'same') return indexOf(form, cases, cases >> 1);
    // The high bits are the random ones.
    return indexOf(form, cases, order === 'in-turn' ? at % cases : Math.floor((state / 2 ** 32) * cases));
  });
}

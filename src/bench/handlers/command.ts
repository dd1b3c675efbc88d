import { EXIT } from '../../cli/exit-codes.js';
import { log, type Output } from '../../cli/output.js';
import { stopRequest } from '../../cli/stop.js';
import { stopped } from '../benchmark.js';
import { stayOnOneProcessor } from '../one-processor.js';
import { CASES, type Cell, geomeans, measureCells } from './cells.js';
import { FORMS } from './switch-code.js';

export interface HandlersCommandOptions {
  readonly rounds: number;
}

/** Runs the benchmark and prints its figures. @throws MemtablesError of whatever failed */
export async function handlersCommand({ rounds }: HandlersCommandOptions, output: Output): Promise<void> {
  const stop = stopRequest({ code: EXIT.internal, message: 'ended at once' });
  stayOnOneProcessor();
  const all: Cell[] = [];
  const switches = FORMS.flatMap((form) => CASES.map((cases) => ({ form, cases })));
  for (const { form, cases } of switches) {
    log.info(`measuring a ${form} switch with ${cases} cases`);
    const cells = await measureCells(form, cases, rounds, stop).catch((error: unknown) => {
      throw stop.aborted ? stopped('--rounds makes', stop.reason) : error;
    });
    for (const cell of cells) output.result({ type: 'cell', ...cell }, describe(cell, cell === cells[0]));
    all.push(...cells);
  }
  const geomeanToUntouched = geomeans(all);
  const means = Object.entries(geomeanToUntouched).map(([name, mean]) => `${name} ${mean.toFixed(2)}`);
  output.result(
    { type: 'summary', geomeanToUntouched },
    `\ntimes the untouched switch, geometric mean: ${means.join(', ')}`,
  );
}

const HEADER = [
  '',
  'form       cases  order    handler     bytes  untouched cycles  to untouched  to seed',
  '',
].join('\n');

function describe(cell: Cell, isFirst: boolean): string {
  const row = [
    cell.form,
    String(cell.cases).padStart(5),
    cell.order.padEnd(7),
    cell.encoder.padEnd(10),
    String(cell.bytes).padStart(6),
    cell.cyclesUntouched.toFixed(1).padStart(16),
    `x${cell.ratioToUntouched.toFixed(2)}`.padStart(12),
    `x${cell.ratioToSeed.toFixed(2)}`.padStart(7),
  ].join('  ');
  return isFirst ? HEADER + row : row;
}

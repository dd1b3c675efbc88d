import { EXIT } from '../cli/exit-codes.js';
import { log, type Output } from '../cli/output.js';
import { stopRequest } from '../cli/stop.js';
import { loadLibvmi } from '../libvmi/library.js';
import { stopped } from './benchmark.js';
import { benchEvents } from './events.js';
import { stayOnOneProcessor } from './one-processor.js';
import { disturbance, type Measured, type Round, type Summary } from './split.js';

/** An idle machine stays below. */
const MOST_DISTURBANCE = 1.5;

export interface EventsCommandOptions {
  readonly seconds: number;
  readonly rounds: number;
  readonly libvmi?: string;
}

/** Runs the benchmark and prints its figures. @throws MemtablesError of whatever failed */
export async function eventsCommand(options: EventsCommandOptions, output: Output): Promise<void> {
  const stop = stopRequest({
    code: EXIT.internal,
    message: 'ended at once; the guest ends with the benchmark',
  });
  const library = loadLibvmi(options.libvmi).path;
  log.info(
    `measuring ${options.rounds} times three listeners, ${options.seconds} s each, through ${library}`,
  );
  // Otherwise the figures jump with where the scheduler puts host and listener; see docs/benchmarks.md.
  stayOnOneProcessor();
  const rounds: Round[] = [];
  const summary = await benchEvents(
    { seconds: options.seconds, rounds: options.rounds, library },
    (round, number) => {
      rounds.push(round);
      output.result({ type: 'round', number, ...round }, describeRound(round, number));
    },
    stop,
  ).catch((error: unknown) => {
    throw stop.aborted ? stopped('--seconds and --rounds make', stop.reason) : error;
  });
  output.result({ type: 'summary', ...summary }, describeSummary(summary));
  if (disturbance(rounds) > MOST_DISTURBANCE) {
    log.warn('other programs kept the processor busy: measure again on an idle machine');
  }
}

function describeRound(round: Round, number: number): string {
  const row = (name: string, { perSecond, turnaround, host, tableLoads }: Measured, more = '') =>
    name.padEnd(9) +
    [
      Math.round(perSecond).toLocaleString('en'),
      turnaround.toFixed(1),
      host.toFixed(1),
      tableLoads.toFixed(2),
    ]
      .map((cell, index) => cell.padStart([9, 16, 10, 22][index]!))
      .join('') +
    more;
  return [
    `round ${number}  reads/s   turnaround µs   host µs  share of table loads`,
    row('bare', round.bare),
    row('binding', round.binding),
    row('engine', round.engine, `   (in its handler ${round.engine.handler.toFixed(2)} µs)`),
  ].join('\n');
}

function describeSummary({ perSecond, ratio, microseconds }: Summary): string {
  const rate = (value: number) => Math.round(value).toLocaleString('en');
  const part = (name: keyof typeof microseconds) => `${name} ${microseconds[name].toFixed(2)} µs`;
  return [
    '',
    `trapped reads a second: engine ${rate(perSecond.engine)}, bare listener ${rate(perSecond.bare)}, ratio ${ratio.toFixed(2)}`,
    `one with the engine: ${(['host', 'library', 'ffi', 'engine'] as const).map(part).join(', ')}`,
  ].join('\n');
}

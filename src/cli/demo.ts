import { demoFailed, runDemo } from '../demo/demo.js';
import { MemtablesError } from '../errors.js';
import type { HandlerChoice } from '../handlers/planner.js';
import { inMilliseconds, plural } from './describe.js';
import { describedProgress, describeSummary } from './describe-main-job.js';
import { EXIT } from './exit-codes.js';
import { randomSeed } from './host.js';
import { log, type Output } from './output.js';
import { stopRequest } from './stop.js';

export interface DemoCommandOptions {
  readonly vcpus: number;
  readonly seconds: number;
  readonly seed?: number;
  readonly hook?: readonly string[];
  readonly handler: HandlerChoice;
  readonly libvmi?: string;
}

/**
 * Runs the demo and prints its figures.
 *
 * @throws MemtablesError of whatever failed; `DEMO_FAILED` when the run did not show what it has to
 */
export async function demoCommand(options: DemoCommandOptions, output: Output): Promise<void> {
  const seed = options.seed ?? randomSeed();
  const stop = stopRequest({
    code: EXIT.internal,
    message: 'ended without unloading; the guest ends with the demo',
  });
  log.info(`starting an embedded host with ${plural(options.vcpus, 'vCPU')}, seed ${seed}`);
  const { summary, shortcomings } = await runDemo(
    {
      vcpus: options.vcpus,
      seconds: options.seconds,
      seed,
      hooks: options.hook,
      handler: options.handler,
      library: options.libvmi,
    },
    describedProgress(
      options.seconds,
      (record, text) => output.result(record, text),
      (message) => log.info(message),
    ),
    stop,
  ).catch((error: unknown) => {
    throw stop.aborted ? demoStopped(stop.reason) : error;
  });
  const unload = inMilliseconds(summary.unload);
  const withoutModule =
    summary.guest.lexer === undefined ? '\nno real code ran in the guest: `npm run binaries` fetches it' : '';
  output.result({ type: 'summary', ...summary, unload }, describeSummary(summary) + withoutModule);
  if (shortcomings.length > 0) throw demoFailed(seed, shortcomings);
}

function demoStopped(cause: unknown): MemtablesError {
  return new MemtablesError('DEMO_FAILED', 'the demo was stopped before it was through', {
    remedy: 'Run it again and let it finish; --seconds makes it shorter.',
    cause,
  });
}

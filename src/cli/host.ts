import { randomInt } from 'node:crypto';
import { runHost } from '../host/host.js';
import { plural } from './describe.js';
import { log } from './output.js';

export interface HostCommandOptions {
  readonly socket: string;
  readonly vcpus: number;
  readonly memory: number;
  readonly seed?: number;
  readonly statistics?: string;
  readonly module: boolean;
}

/** Runs the embedded host until Ctrl-C, or until the process ends that has started it as its own. */
export async function hostCommand(options: HostCommandOptions): Promise<void> {
  const stop = new AbortController();
  for (const ending of ['SIGINT', 'SIGTERM', 'SIGHUP', 'disconnect']) process.on(ending, () => stop.abort());
  const seed = options.seed ?? randomSeed();
  log.info(`starting a guest with ${plural(options.vcpus, 'vCPU')}, seed ${seed}`);
  await runHost({
    socket: options.socket,
    vcpus: options.vcpus,
    memoryMB: options.memory,
    seed,
    module: options.module,
    ...(options.statistics === undefined ? {} : { statisticsPath: options.statistics }),
    signal: stop.signal,
    log: (message) => log.info(message),
  });
}

/** A seed is 32 bits. */
export function randomSeed(): number {
  return randomInt(2 ** 32);
}

import { type ChildProcess, spawn } from 'node:child_process';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { MemtablesError } from '../errors.js';
import { type HostStatistics, StatisticsClient } from '../host/statistics-client.js';

const BOOT_MS = 30_000;
const POLL_MS = 50;
const CLI = fileURLToPath(new URL('../cli/main.js', import.meta.url));

/** A host process of our own, with its statistics channel. */
export class EmbeddedHost {
  private constructor(
    private readonly process: ChildProcess,
    private readonly client: StatisticsClient,
  ) {}

  /**
   * Starts `memtables host` and waits until its guest has booted.
   *
   * @throws MemtablesError `MACHINE_FAILED` when it ends, or does not boot in time
   */
  static async start(socket: string, vcpus: number, seed: number): Promise<EmbeddedHost> {
    const statistics = `${socket}.stats`;
    const child = spawn(
      process.execPath,
      [
        CLI,
        'host',
        ...['--socket', socket, '--statistics', statistics],
        ...['--vcpus', String(vcpus), '--seed', String(seed)],
      ],
      { stdio: ['ignore', 'ignore', 'inherit'] },
    );
    const deadline = performance.now() + BOOT_MS;
    let client: StatisticsClient | undefined;
    while (performance.now() < deadline && child.exitCode === null && child.signalCode === null) {
      await sleep(POLL_MS);
      client ??= await StatisticsClient.connect(statistics).catch(() => undefined);
      const booted = client !== undefined && (await client.statistics()).guest !== undefined;
      if (client !== undefined && booted) return new EmbeddedHost(child, client);
    }
    const ended = child.exitCode !== null || child.signalCode !== null;
    client?.close();
    child.kill();
    throw new MemtablesError(
      'MACHINE_FAILED',
      ended
        ? 'the embedded host ended before its guest had booted'
        : 'the embedded guest did not boot in time',
      {
        remedy: 'See what the host printed above; `npm run setup` builds what it needs.',
        context: { vcpus, seed, exitCode: child.exitCode, waitedMs: BOOT_MS },
      },
    );
  }

  statistics(): Promise<HostStatistics> {
    return this.client.statistics();
  }

  /** The bytes of the kernel image that must be as before: headers, non-writable sections and slack. */
  image(): Promise<Buffer> {
    return this.client.image();
  }

  stop(): void {
    this.client.close();
    this.process.kill();
  }
}

import { type ChildProcess, spawn } from 'node:child_process';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { type ErrorContext, MemtablesError } from '../errors.js';
import { type HostStatistics, StatisticsClient } from '../host/statistics-client.js';
import { unlessAborted } from './unless-aborted.js';

const BOOT_MS = 30_000;
const POLL_MS = 50;
const CLI = fileURLToPath(new URL('../cli/main.js', import.meta.url));

/** A host process of our own, with its statistics channel. It ends with this process, however that ends. */
export class EmbeddedHost {
  private constructor(
    private readonly child: Child,
    private readonly client: StatisticsClient,
  ) {}

  /**
   * Starts `memtables host` and waits until its guest has booted. It logs as much as this process does, unless
   * `logLevel` is its own; its guest has the module where that has been fetched, unless told otherwise.
   *
   * @throws MemtablesError `MACHINE_FAILED` when it ends, or does not boot in time; the reason of `signal`
   */
  static async start(
    socket: string,
    vcpus: number,
    seed: number,
    signal: AbortSignal,
    { logLevel = process.env.MEMTABLES_LOG, module = true } = {},
  ): Promise<EmbeddedHost> {
    const statistics = `${socket}.stats`;
    const child = new Child(
      [
        ...['host', '--socket', socket, '--statistics', statistics],
        ...['--vcpus', String(vcpus), '--seed', String(seed)],
        ...(module ? [] : ['--no-module']),
      ],
      logLevel,
    );
    let client: StatisticsClient | undefined;
    const booted = async () => {
      for (; child.ending === undefined; await sleep(POLL_MS)) {
        client ??= await StatisticsClient.connect(statistics).catch(() => undefined);
        const report = await client?.statistics().catch(() => undefined);
        if (client !== undefined && report?.guest !== undefined) return new EmbeddedHost(child, client);
      }
      return undefined;
    };
    try {
      const host = await unlessAborted(AbortSignal.any([signal, AbortSignal.timeout(BOOT_MS)]), booted());
      if (host !== undefined) return host;
      throw bootFailed('the embedded host ended before its guest had booted', { ending: child.ending });
    } catch (error) {
      client?.close();
      await child.kill();
      signal.throwIfAborted();
      if (error instanceof MemtablesError) throw error;
      throw bootFailed('the embedded guest did not boot in time', { waitedMs: BOOT_MS });
    }
  }

  statistics(): Promise<HostStatistics> {
    return this.client.statistics();
  }

  /** The bytes of the kernel image that must be as before: headers, non-writable sections and slack. */
  image(): Promise<Buffer> {
    return this.client.image();
  }

  /** Resolves when the process is gone. */
  async stop(): Promise<void> {
    this.client.close();
    await this.child.kill();
  }
}

function bootFailed(message: string, context: ErrorContext): MemtablesError {
  return new MemtablesError('MACHINE_FAILED', message, {
    remedy: 'See what the host printed above; `npm run setup` builds what it needs.',
    context,
  });
}

/** A `memtables` process. */
class Child {
  /** How it has ended: an exit code, a signal, or why it could not be started. */
  ending: string | undefined;
  private readonly process: ChildProcess;
  private readonly ended: Promise<void>;

  constructor(args: readonly string[], logLevel: string | undefined) {
    this.process = spawn(process.execPath, [CLI, ...args], {
      // It ends when the channel closes: when this process is gone.
      stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
      // Ctrl-C in a terminal is for this process: the guest is needed until it has been unloaded from.
      detached: true,
      env: { ...process.env, MEMTABLES_LOG: logLevel },
    });
    this.ended = new Promise((resolve) => {
      const end = (ending: string) => {
        this.ending ??= ending;
        resolve();
      };
      this.process.once('error', (error) => end(error.message));
      this.process.once('exit', (code, signal) => end(signal ?? `exit code ${code}`));
    });
  }

  /** At once, and also when it hangs: all it has is a guest that nobody needs any more. */
  async kill(): Promise<void> {
    this.process.kill('SIGKILL');
    await this.ended;
  }
}

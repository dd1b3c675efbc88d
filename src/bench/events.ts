import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { EmbeddedHost } from '../demo/embedded-host.js';
import { readGuestArtefacts } from '../guest/artefacts.js';
import { BareListener, ListenerThread } from './listeners.js';
import { type Measured, measuredBetween, type Round, type Summary, summarize } from './split.js';

export interface EventBenchOptions {
  /** Length of each measurement; each round has three. */
  readonly seconds: number;
  readonly rounds: number;
  /** A library with libvmi's C ABI. */
  readonly library: string;
}

const GUEST_NAME = 'embedded';
/** With one, it either runs or waits for an answer, so that the parts of a read's time add up. */
const VCPUS = 1;
/** The same guest in every run. */
const SEED = 1;
/** Three tools come and go in every round. */
const HOST_LOG = process.env.MEMTABLES_LOG ?? 'warn';
/** What has just attached is not measured yet. */
const SETTLE_MS = 300;

/**
 * Measures what a trapped read takes with a bare listener, with the binding alone, and with the engine, in turn on
 * one host.
 *
 * The engine relocates nothing, so that every table load on a page with a hidden byte traps, and every read of the
 * guest's integrity checker. The other two trap the frames that it trapped in the same round, and see the same
 * accesses: only the hooked functions' first instructions differ, which run in place then. How the reads divide into
 * table loads and others depends on the guest's clock; it is reported for each measurement.
 *
 * @throws MemtablesError of whatever failed; the reason of `signal`
 */
export async function benchEvents(
  options: EventBenchOptions,
  onRound: (round: Round, number: number) => void,
  signal: AbortSignal,
): Promise<Summary> {
  const artefacts = readGuestArtefacts();
  const directory = mkdtempSync(join(tmpdir(), 'memtables-'));
  try {
    const socket = join(directory, 'kvmi');
    // Nothing is to run that does not trap, as far as that can be.
    const host = await EmbeddedHost.start(socket, VCPUS, SEED, signal, { logLevel: HOST_LOG, module: false });
    const listeners = new Listeners(host, options.seconds * 1000, signal, {
      name: GUEST_NAME,
      socket,
      library: options.library,
      profile: artefacts.profilePath,
      journal: `${socket}.journal`,
      hooks: artefacts.sites.defaultHooks.map((name) => `nt!${name}`),
    });
    try {
      const rounds: Round[] = [];
      while (rounds.length < options.rounds) {
        const round = await listeners.round();
        rounds.push(round);
        onRound(round, rounds.length);
      }
      return summarize(rounds);
    } finally {
      // First the host: what listens to one that is gone ends.
      await host.stop();
      await listeners.end();
    }
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

class Listeners {
  readonly #thread: ListenerThread;

  constructor(
    private readonly host: EmbeddedHost,
    private readonly milliseconds: number,
    private readonly signal: AbortSignal,
    private readonly options: ConstructorParameters<typeof ListenerThread>[0],
  ) {
    this.#thread = new ListenerThread(options);
  }

  async round(): Promise<Round> {
    const frames = await this.#thread.attachEngine();
    const engine = await this.#measureEngine();
    await this.#thread.detach();
    await this.#thread.attachBinding(frames);
    const binding = await this.#measure();
    await this.#thread.detach();
    const listener = await BareListener.attach(this.options, frames, this.signal);
    const bare = await this.#measure();
    await listener.detach();
    return { bare, binding, engine };
  }

  async end(): Promise<void> {
    await this.#thread.end();
  }

  async #measureEngine(): Promise<Round['engine']> {
    await this.#wait(SETTLE_MS);
    const from = this.#thread.handlerTime;
    const measured = await this.#watch();
    const to = this.#thread.handlerTime;
    return { ...measured, handler: ((to.ms - from.ms) / (to.calls - from.calls)) * 1000 };
  }

  async #measure(): Promise<Measured> {
    await this.#wait(SETTLE_MS);
    return await this.#watch();
  }

  async #watch(): Promise<Measured> {
    const from = await this.host.statistics();
    await this.#wait(this.milliseconds);
    return measuredBetween(from, await this.host.statistics());
  }

  /** Only here a round can be stopped: what waits for a hypervisor waits for long when that does not come any more. */
  async #wait(milliseconds: number): Promise<void> {
    await sleep(milliseconds, undefined, { signal: this.signal });
  }
}

import { type ChildProcess, spawn } from 'node:child_process';
import { on, once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { fromPortable } from '../attachment/protocol.js';
import { MemtablesError } from '../errors.js';
import { type Gfn, hex } from '../vmi/address.js';
import { HandlerTime } from './handler-time.js';
import type { ListenerCommand, ListenerMessage, ListenerOptions } from './protocol.js';

const BARE_LISTENER = fileURLToPath(new URL('../../build/Release/kvmi-bare-listener', import.meta.url));

/** Listens in a thread of its own, with the engine or with the binding alone; one after the other. */
export class ListenerThread {
  readonly #worker: Worker;
  /** Kept until they are asked for: the thread may fail while nobody waits for it. */
  readonly #messages: AsyncIterator<unknown[]>;
  readonly #handlerTime: HandlerTime;

  constructor(options: Omit<ListenerOptions, 'handlerTime'>) {
    const handlerTime = new SharedArrayBuffer(HandlerTime.BYTES);
    this.#handlerTime = new HandlerTime(handlerTime);
    const workerData: ListenerOptions = { ...options, handlerTime };
    this.#worker = new Worker(new URL('./worker.js', import.meta.url), { workerData, execArgv: [] });
    this.#messages = on(this.#worker, 'message')[Symbol.asyncIterator]();
  }

  /** How long the engine's handler has taken so far. */
  get handlerTime(): HandlerTime['totals'] {
    return this.#handlerTime.totals;
  }

  /** Returns the frames that the engine traps. @throws MemtablesError of whatever failed */
  async attachEngine(): Promise<readonly Gfn[]> {
    const message = await this.#ask({ type: 'engine' });
    return message.type === 'listening' ? message.frames : [];
  }

  /** @throws MemtablesError of whatever failed */
  async attachBinding(frames: readonly Gfn[]): Promise<void> {
    await this.#ask({ type: 'binding', frames });
  }

  /** @throws MemtablesError of what failed since it attached */
  async detach(): Promise<void> {
    await this.#ask({ type: 'detach' });
  }

  /** To be called when nothing is attached, or the hypervisor is gone. */
  async end(): Promise<void> {
    await this.#worker.terminate();
  }

  async #ask(command: ListenerCommand): Promise<ListenerMessage> {
    this.#worker.postMessage(command);
    const [message] = (await this.#messages.next()).value as [ListenerMessage];
    if (message.type === 'failed') throw fromPortable(message.error);
    return message;
  }
}

/** A process of its own that does the least that a listener does; `native/kvmi/bench` says what. */
export class BareListener {
  readonly #process: ChildProcess;
  readonly #ended: Promise<string>;

  private constructor(args: readonly string[], signal: AbortSignal) {
    this.#process = spawn(BARE_LISTENER, args, {
      stdio: ['pipe', 'pipe', 'inherit'],
      signal,
      killSignal: 'SIGKILL',
    });
    this.#ended = new Promise((resolve) => {
      this.#process.once('error', (error) => resolve(error.message));
      this.#process.once('exit', (code, signal) => resolve(signal ?? `exit code ${code}`));
    });
  }

  /** @throws MemtablesError `BENCH_FAILED` when it ends before it listens, also by `signal` */
  static async attach(
    { library, name, socket }: Pick<ListenerOptions, 'library' | 'name' | 'socket'>,
    frames: readonly Gfn[],
    signal: AbortSignal,
  ): Promise<BareListener> {
    const listener = new BareListener([library, name, socket, ...frames.map(hex)], signal);
    const listening = once(createInterface({ input: listener.#process.stdout! }), 'line');
    const ending = await Promise.race([listening.then(() => undefined), listener.#ended]);
    if (ending !== undefined) throw listenerFailed(ending);
    return listener;
  }

  /** @throws MemtablesError `BENCH_FAILED` when it had ended, or did not detach cleanly */
  async detach(): Promise<void> {
    this.#process.stdin!.end();
    const ending = await this.#ended;
    if (ending !== 'exit code 0') throw listenerFailed(ending);
  }
}

function listenerFailed(ending: string): MemtablesError {
  return new MemtablesError('BENCH_FAILED', 'the bare listener failed', {
    remedy: 'See what it printed above; `npm run setup` builds it.',
    context: { program: BARE_LISTENER, ending },
  });
}

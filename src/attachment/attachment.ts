import { EventEmitter } from 'node:events';
import { resolve } from 'node:path';
import { Worker } from 'node:worker_threads';
import { MemtablesError } from '../errors.js';
import type { HandlerChoice } from '../handlers/planner.js';
import { cutConnection } from '../libvmi/cut.js';
import { removeSocket } from '../libvmi/socket-path.js';
import { createHeartbeat, Watchdog } from '../libvmi/watchdog.js';
import type { EngineEvent, LoadCounts, Statistics, UnloadReport } from '../memtables/report.js';
import {
  type Answers,
  type AttachedKernel,
  type Command,
  fromPortable,
  type Request,
  type WorkerMessage,
  type WorkerOptions,
} from './protocol.js';
import { withJournal } from './with-journal.js';

export interface AttachOptions {
  /** The VM's name, as libvmi knows it. */
  readonly name: string;
  /** On KVM: the unix socket that the hypervisor connects to. Without it the VM runs on Xen. */
  readonly socket?: string;
  /** The ISF profile of the guest's kernel. */
  readonly profile: string;
  /** A library with libvmi's C ABI; without it the bundled one, else an installed libvmi. */
  readonly library?: string;
  /** A load is relocated once it has trapped more often than this. */
  readonly threshold?: number;
  /** What hot table loads are replaced by; without it the fastest handler that fits. */
  readonly handler?: HandlerChoice;
  /** Whether to relocate from the start; `setRelocation` changes it. */
  readonly relocate?: boolean;
  /** Whether switches on trapped pages are relocated before they have trapped; the pages are planned from the image. */
  readonly ahead?: boolean;
  /** Where changes to the guest are recorded while they last. */
  readonly journal?: string;
  /** How long unloading waits for threads to leave the handlers. */
  readonly unloadSeconds?: number;
  /**
   * A native call that takes longer than this, beyond its own timeout, is taken for one that never returns. The bundled
   * library gives a hypervisor that does not answer up after 10 seconds anyway, libvmi itself after 15.
   */
  readonly stuckAfterSeconds?: number;
  /** Called when it begins to wait for the hypervisor: what could be checked by then is in order. */
  readonly onWaiting?: () => void;
  /** Gives up waiting for the hypervisor; of no effect once it has connected. */
  readonly signal?: AbortSignal;
}

/** The threshold of HVMI's documentation. */
export const DEFAULT_THRESHOLD = 50;
export const DEFAULT_HANDLER: HandlerChoice = 'auto';
export const DEFAULT_UNLOAD_SECONDS = 60;

/** Below the 10 seconds after which the bundled library takes a silent hypervisor for one that has gone. */
export const DEFAULT_STUCK_AFTER_SECONDS = 8;

interface Events {
  event: [EngineEvent];
}

interface Pending {
  resolve(value: Answers[keyof Answers]): void;
  reject(error: Error): void;
}

/**
 * A guest with memtables attached: the engine runs in a worker thread of its own, which owns libvmi, and a
 * watchdog here notices when a call of it never returns.
 */
export class Attachment extends EventEmitter<Events> {
  readonly kernel: AttachedKernel;
  /** Settles when the worker has ended: rejected when it ended by an error, also one of `unload`. */
  readonly ended: Promise<void>;
  readonly #worker: Worker;
  readonly #pending: Map<number, Pending>;
  /** Why nothing can be asked any more. */
  #endedBy: Error | undefined;
  #unloading: Promise<UnloadReport> | undefined;
  #nextId = 1;

  private constructor(
    worker: Worker,
    kernel: AttachedKernel,
    ended: Promise<void>,
    pending: Map<number, Pending>,
  ) {
    super();
    this.#worker = worker;
    this.kernel = kernel;
    this.ended = ended;
    this.#pending = pending;
    worker.on('message', (message: WorkerMessage) => {
      if (message.type === 'event') this.emit('event', message.event);
    });
    const onEnd = (error: Error) => {
      this.#endedBy = error;
    };
    ended.then(() => onEnd(unloaded()), onEnd);
  }

  /**
   * Attaches and finds the kernel; changes nothing in the guest yet. An error that ends the attachment later tells what
   * is still in the guest: `context.journal` and `context.inGuest`.
   *
   * @throws MemtablesError of whatever stood in the way, and `HYPERVISOR_STUCK` when a native call never returns:
   *   the process cannot end by itself then; or the reason of `signal`, while a native call still waits for up to
   *   ten seconds
   */
  static async open(options: AttachOptions): Promise<Attachment> {
    options.signal?.throwIfAborted();
    const heartbeat = createHeartbeat();
    const workerData: WorkerOptions = {
      name: options.name,
      socket: options.socket,
      profile: options.profile,
      library: options.library,
      threshold: options.threshold ?? DEFAULT_THRESHOLD,
      handler: options.handler ?? DEFAULT_HANDLER,
      relocate: options.relocate ?? true,
      ahead: options.ahead ?? false,
      journal: resolve(options.journal ?? journalOf(options)),
      unloadSeconds: options.unloadSeconds ?? DEFAULT_UNLOAD_SECONDS,
      heartbeat,
    };
    // Without the program's own Node options: `--input-type` of `node -e` would not fit a file.
    const worker = new Worker(new URL('./worker.js', import.meta.url), { workerData, execArgv: [] });
    const pending = new Map<number, Pending>();
    const cut = () => {
      if (options.socket !== undefined) cutConnection(options.socket);
      // Xen has no connection to cut: should the call return after all, what is in the guest is taken out.
      else worker.postMessage({ id: 0, command: { type: 'unload' } } satisfies Request);
    };
    let state: 'starting' | 'connecting' | 'connected' | 'attached' = 'starting';

    return await new Promise<Attachment>((attached, failed) => {
      let settle: (error?: Error) => void = () => {};
      const ended = new Promise<void>((done, broken) => {
        let settled = false;
        settle = (error) => {
          if (settled) return;
          settled = true;
          watchdog.stop();
          options.signal?.removeEventListener('abort', giveUp);
          // Nothing is changed before it has attached.
          const failure = error && state === 'attached' ? withJournal(error, workerData.journal) : error;
          if (failure === undefined) done();
          else broken(failure);
          const why = failure ?? unloaded();
          failed(why);
          for (const { reject } of pending.values()) reject(why);
          pending.clear();
        };
      });
      // Whoever waits for `ended` sees the error; without anybody it must not end the process.
      ended.catch(() => {});
      const limitMs = (options.stuckAfterSeconds ?? DEFAULT_STUCK_AFTER_SECONDS) * 1000;
      const watchdog = new Watchdog(heartbeat, { limitMs }, (error) => {
        settle(error);
        // Frees the worker, which can then end, and the guest.
        cut();
      });
      const giveUp = () => {
        if (state === 'connected' || state === 'attached') return;
        // Nobody can connect any more; somebody who just has is left at once.
        if (state === 'connecting' && options.socket !== undefined) removeSocket(options.socket);
        worker.postMessage({ id: 0, command: { type: 'unload' } } satisfies Request);
        settle(options.signal?.reason);
      };
      options.signal?.addEventListener('abort', giveUp);

      worker.on('error', (error) =>
        settle(state === 'attached' ? crashed(workerData.journal, error) : error),
      );
      worker.on('exit', () => {
        settle(crashed(workerData.journal));
        // A worker that was ended by force has not detached.
        cut();
      });
      worker.on('message', (message: WorkerMessage) => {
        switch (message.type) {
          case 'connecting':
            state = message.type;
            options.onWaiting?.();
            break;
          case 'connected':
            state = message.type;
            break;
          case 'attached':
            state = message.type;
            attached(new Attachment(worker, message.kernel, ended, pending));
            break;
          case 'answer':
            pending.get(message.id)?.resolve(message.value);
            pending.delete(message.id);
            break;
          case 'refusal':
            pending.get(message.id)?.reject(fromPortable(message.error));
            pending.delete(message.id);
            break;
          case 'ended':
            settle(message.error && fromPortable(message.error));
            break;
          case 'event':
            break;
        }
      });
    });
  }

  /**
   * Places a transparent detour on `nt!Name`, `module!Name` or `module+0xRVA`.
   *
   * @throws MemtablesError `INVALID_ARGUMENT`, `HOOK_REFUSED`, `SYMBOL_NOT_FOUND`, `SLACK_EXHAUSTED`: the guest is
   *   as before then, and the attachment goes on
   */
  async hook(name: string): Promise<void> {
    await this.#ask({ type: 'hook', name });
  }

  /** Switches relocation on or off; when it resolves, what was hot by then has been relocated. */
  async setRelocation(enabled: boolean): Promise<void> {
    await this.#ask({ type: 'relocate', enabled });
  }

  async statistics(): Promise<Statistics> {
    return await this.#ask({ type: 'statistics' });
  }

  /** The table loads that have trapped. */
  async loads(): Promise<readonly LoadCounts[]> {
    return await this.#ask({ type: 'loads' });
  }

  /**
   * Takes every change back and detaches. Called again, it gives the same report; after an error that ended the
   * attachment, the worker has tried it already, and that error is thrown.
   *
   * @throws MemtablesError `UNLOAD_BLOCKED` when threads stay inside handlers for too long, `ROLLBACK_FAILED` when
   *   changes could not be undone; the cause is what had failed before
   */
  unload(): Promise<UnloadReport> {
    this.#unloading ??= this.#unload();
    return this.#unloading;
  }

  async #unload(): Promise<UnloadReport> {
    const report = this.#ask({ type: 'unload' });
    // It is the error that ends the worker.
    report.catch(() => {});
    await this.ended;
    return await report;
  }

  #ask<C extends Command>(command: C): Promise<Answers[C['type']]> {
    if (this.#endedBy !== undefined) return Promise.reject(this.#endedBy);
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      this.#pending.set(id, { resolve: resolve as Pending['resolve'], reject });
      this.#worker.postMessage({ id, command } satisfies Request);
    });
  }
}

/** Where changes to a guest are recorded unless another place is named. */
export function journalOf({ name, socket }: Pick<AttachOptions, 'name' | 'socket'>): string {
  return `${socket ?? name}.journal`;
}

function unloaded(): MemtablesError {
  return new MemtablesError('NOT_ATTACHED', 'memtables has been unloaded from this guest', {
    remedy: 'Attach again.',
  });
}

function crashed(journal: string, cause?: unknown): MemtablesError {
  return new MemtablesError(
    'ROLLBACK_FAILED',
    'the thread that owns libvmi ended without undoing its changes',
    {
      remedy: 'Read the journal, if there is one: it names the bytes that are still in the guest.',
      context: { journal },
      cause,
    },
  );
}

import { EventEmitter } from 'node:events';
import { resolve } from 'node:path';
import { Worker } from 'node:worker_threads';
import { MemtablesError } from '../errors.js';
import { cutConnection } from '../libvmi/cut.js';
import { createHeartbeat, Watchdog } from '../libvmi/watchdog.js';
import type { EngineEvent, Statistics, UnloadReport } from '../memtables/report.js';
import {
  type Answers,
  type AttachedKernel,
  type Command,
  fromPortable,
  type Request,
  type WorkerMessage,
  type WorkerOptions,
} from './protocol.js';

export interface AttachOptions {
  /** The VM's name, as libvmi knows it. */
  readonly name: string;
  /** The unix socket that the hypervisor connects to. */
  readonly socket: string;
  /** The ISF profile of the guest's kernel. */
  readonly profile: string;
  /** A library with libvmi's C ABI; the bundled one without it. */
  readonly library?: string;
  /** A load is relocated once it has trapped more often than this. */
  readonly threshold?: number;
  /** Whether to relocate from the start; `setRelocation` changes it. */
  readonly relocate?: boolean;
  /** Where changes to the guest are recorded while they last. */
  readonly journal?: string;
  /** How long unloading waits for threads to leave the handlers. */
  readonly unloadSeconds?: number;
}

/** The document's threshold. */
export const DEFAULT_THRESHOLD = 50;
export const DEFAULT_UNLOAD_SECONDS = 60;

/** A native call that takes longer than this (beyond its own timeout) is reported as stuck. */
const STUCK_AFTER_MS = 15_000;

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
  }

  /**
   * Attaches and finds the kernel; changes nothing in the guest yet.
   *
   * @throws MemtablesError of whatever stood in the way, and `HYPERVISOR_STUCK` when a native call never returns
   */
  static async open(options: AttachOptions): Promise<Attachment> {
    const heartbeat = createHeartbeat();
    const workerData: WorkerOptions = {
      name: options.name,
      socket: options.socket,
      profile: options.profile,
      library: options.library,
      threshold: options.threshold ?? DEFAULT_THRESHOLD,
      relocate: options.relocate ?? true,
      journal: resolve(options.journal ?? `${options.socket}.journal`),
      unloadSeconds: options.unloadSeconds ?? DEFAULT_UNLOAD_SECONDS,
      heartbeat,
    };
    const worker = new Worker(new URL('./worker.js', import.meta.url), { workerData });
    const pending = new Map<number, Pending>();

    return await new Promise<Attachment>((attached, failed) => {
      let settle: (error?: Error) => void = () => {};
      const ended = new Promise<void>((done, broken) => {
        settle = (error) => {
          watchdog.stop();
          if (error === undefined) done();
          else broken(error);
          failed(error ?? unexpectedEnd());
          for (const { reject } of pending.values()) reject(error ?? unexpectedEnd());
          pending.clear();
        };
      });
      // Whoever waits for `ended` sees the error; without anybody it must not end the process.
      ended.catch(() => {});
      const watchdog = new Watchdog(heartbeat, { limitMs: STUCK_AFTER_MS }, (error) => {
        settle(error);
        // Frees the worker, which can then end, and the guest.
        cutConnection(options.socket);
      });

      worker.on('error', (error) => settle(error as Error));
      worker.on('exit', () => {
        settle(unexpectedEnd());
        // A worker that was ended by force has not detached.
        cutConnection(options.socket);
      });
      worker.on('message', (message: WorkerMessage) => {
        switch (message.type) {
          case 'attached':
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
   * Places a transparent detour on `nt!Name`.
   *
   * @throws MemtablesError `HOOK_REFUSED`, `SYMBOL_NOT_FOUND`, `SLACK_EXHAUSTED`; the guest is as before then
   */
  async hook(name: string): Promise<void> {
    await this.#ask({ type: 'hook', name });
  }

  /** Switches the relocation of further table loads on or off. */
  async setRelocation(enabled: boolean): Promise<void> {
    await this.#ask({ type: 'relocate', enabled });
  }

  async statistics(): Promise<Statistics> {
    return await this.#ask({ type: 'statistics' });
  }

  /**
   * Takes every change back and detaches.
   *
   * @throws MemtablesError `UNLOAD_BLOCKED` when threads stay inside handlers for too long
   */
  async unload(): Promise<UnloadReport> {
    const report = await this.#ask({ type: 'unload' });
    await this.ended;
    return report;
  }

  #ask<C extends Command>(command: C): Promise<Answers[C['type']]> {
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      this.#pending.set(id, { resolve: resolve as Pending['resolve'], reject });
      this.#worker.postMessage({ id, command } satisfies Request);
    });
  }
}

function unexpectedEnd(): Error {
  return new MemtablesError('HYPERVISOR_FAILED', 'the thread that owns libvmi ended', {
    remedy: 'Attach again; if a journal is left, read it first.',
  });
}

import { readFileSync } from 'node:fs';
import { MessageChannel, type MessagePort, receiveMessageOnPort, Worker } from 'node:worker_threads';
import ts from 'typescript';
import type { Operations, PeerOptions } from './peer-thread.js';

const PATIENCE_MS = 20_000;

type Result<Name extends keyof Operations> = Awaited<ReturnType<Operations[Name]>>;

/** The test's handle on a scripted hypervisor; its methods block, as those of the session do. */
export class Peer {
  readonly #worker: Worker;
  readonly #port: MessagePort;
  readonly #signal: Int32Array;

  private constructor(worker: Worker, port: MessagePort, signal: Int32Array) {
    this.#worker = worker;
    this.#port = port;
    this.#signal = signal;
  }

  /** Starts a peer that connects to `options.socket` as soon as somebody listens there. */
  static async start(options: PeerOptions): Promise<Peer> {
    const { port1, port2 } = new MessageChannel();
    const signal = new Int32Array(new SharedArrayBuffer(Int32Array.BYTES_PER_ELEMENT));
    // Not every supported Node runs TypeScript.
    const source = ts.transpile(readFileSync(new URL('./peer-thread.ts', import.meta.url), 'utf8'), {
      module: ts.ModuleKind.ESNext,
      target: ts.ScriptTarget.ES2022,
    });
    const worker = new Worker(new URL(`data:text/javascript,${encodeURIComponent(source)}`), {
      workerData: { options, control: port2, signal },
      transferList: [port2],
    });
    await new Promise<void>((online, failed) => {
      worker.once('online', online);
      worker.once('error', failed);
    });
    return new Peer(worker, port1, signal);
  }

  /** Has the peer carry out one operation, and waits for it. */
  ask<Name extends keyof Operations>(name: Name, ...args: Parameters<Operations[Name]>): Result<Name> {
    const before = Atomics.load(this.#signal, 0);
    this.#port.postMessage([name, args]);
    if (Atomics.wait(this.#signal, 0, before, PATIENCE_MS) === 'timed-out') {
      throw new Error(`the peer did not carry out ${name}`);
    }
    const { value, error } = receiveMessageOnPort(this.#port)!.message as {
      value: Result<Name>;
      error?: string;
    };
    if (error !== undefined) throw new Error(error);
    return value;
  }

  async stop(): Promise<void> {
    await this.#worker.terminate();
    this.#port.close();
  }
}

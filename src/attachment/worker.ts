// The one thread that owns libvmi: it listens, lets the engine work between two listens, and takes commands.
import { type MessagePort, parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads';
import { MemtablesError } from '../errors.js';
import { Journal } from '../journal/journal.js';
import { loadLibvmi } from '../libvmi/library.js';
import { openSessionOn } from '../libvmi/open-session.js';
import { prepareSocketPath } from '../libvmi/socket-path.js';
import { Engine } from '../memtables/engine.js';
import { loadProfile } from '../nt/profile.js';
import type { Gpa } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { findKernel } from './find-kernel.js';
import {
  type Answers,
  type Command,
  type Request,
  toPortable,
  type WorkerMessage,
  type WorkerOptions,
} from './protocol.js';
import { undoFailed } from './undo-failed.js';

/** A guest can make work without end; what is left is done between two listens. */
const MOST_STEPS = 10_000;

/** One that is silent is not noticed by listening. Asking once in so long costs nothing. */
const ASK_MS = 2000;

/** How long a listen waits where nothing happens; commands are taken between two listens. */
const LISTEN_MS = 20;

async function main(port: MessagePort, options: WorkerOptions): Promise<void> {
  const post = (message: WorkerMessage) => port.postMessage(message);
  const profile = loadProfile(options.profile);
  // Before anything waits.
  const library = loadLibvmi(options.library, options.socket === undefined ? 'xen' : 'kvm');
  if (options.socket !== undefined) prepareSocketPath(options.socket);
  Journal.check(options.journal, options.name);
  post({ type: 'connecting' });
  const session = openSessionOn(library, {
    name: options.name,
    heartbeat: options.heartbeat,
    ...(options.socket === undefined ? {} : { socket: options.socket }),
  });
  post({ type: 'connected' });
  await closing(session, async () => {
    const kernel = await findKernel(session, profile);
    const { name, guid, age } = profile.pdb;
    const identity = { guest: options.name, kernelBase: kernel.base, pdb: `${name}/${guid}/${age}` };
    const journal = Journal.create(options.journal, identity, ({ gpa, before }) =>
      holds(session, gpa, before),
    );
    await closing(journal, () => {
      const engine = new Engine(session, kernel, journal, {
        threshold: options.threshold,
        handler: options.handler,
        ahead: options.ahead,
        unloadSeconds: options.unloadSeconds,
        report: (event) => post({ type: 'event', event }),
      });
      engine.relocating = options.relocate;
      post({
        type: 'attached',
        kernel: {
          base: kernel.base,
          size: kernel.image.sizeOfImage,
          pdb: profile.pdb.name,
          vcpus: session.vcpuCount,
          modules: engine.moduleCount,
          library: library.path,
        },
      });
      serve(port, session, engine);
    });
  });
}

/** Uses a resource and closes it. Of two errors the first one counts: that of the use. */
async function closing(resource: { close(): void }, use: () => void | Promise<void>): Promise<void> {
  try {
    await use();
  } catch (error) {
    try {
      resource.close();
    } catch {
      // A journal that could not be closed is still there.
    }
    throw error;
  }
  resource.close();
}

/** Memory that a guest does not have holds no change. */
function holds(session: Hypervisor, gpa: Gpa, bytes: Uint8Array): boolean {
  if (gpa + BigInt(bytes.length) > session.maxPhysicalAddress) return true;
  return Buffer.compare(session.readPhysical(gpa, bytes.length), bytes) === 0;
}

/** Runs until the engine has unloaded, whether it was asked to or something failed. */
function serve(port: MessagePort, session: Hypervisor, engine: Engine): void {
  try {
    let asked = performance.now();
    for (let unloaded = false; !unloaded; ) {
      session.listen(LISTEN_MS);
      engine.work();
      if (performance.now() - asked > ASK_MS) {
        session.registers(0);
        asked = performance.now();
      }
      unloaded = takeCommands(port, session, engine);
    }
  } catch (error) {
    const unloadFailed = error instanceof MemtablesError && error.code === 'UNLOAD_BLOCKED';
    throw engine.loaded && !unloadFailed ? unloadAfter(error, engine) : error;
  }
}

/** Unloads because of an error; returns what the user has to hear of: that, unless unloading failed as well. */
function unloadAfter(cause: unknown, engine: Engine): unknown {
  try {
    engine.unload();
    return cause;
  } catch (error) {
    return undoFailed(error, cause);
  }
}

function takeCommands(port: MessagePort, session: Hypervisor, engine: Engine): boolean {
  for (;;) {
    const received = receiveMessageOnPort(port) as { message: Request } | undefined;
    if (received === undefined) return false;
    const { id, command } = received.message;
    try {
      port.postMessage({
        type: 'answer',
        id,
        value: perform(session, engine, command),
      } satisfies WorkerMessage);
    } catch (error) {
      // Anything else ends the attachment, which answers it.
      if (command.type !== 'hook' || !isRefusal(error)) throw error;
      port.postMessage({ type: 'refusal', id, error: toPortable(error) } satisfies WorkerMessage);
    }
    if (command.type === 'unload') return true;
  }
}

function perform(session: Hypervisor, engine: Engine, command: Command): Answers[Command['type']] {
  switch (command.type) {
    case 'hook':
      engine.hook(command.name);
      return undefined;
    case 'relocate':
      engine.relocating = command.enabled;
      // What is hot already is relocated before the answer.
      for (let steps = 0; engine.hasWork && steps < MOST_STEPS; steps++) {
        session.listen(0);
        engine.work();
      }
      return undefined;
    case 'statistics':
      return engine.statistics();
    case 'loads':
      return engine.loads();
    case 'unload':
      return engine.unload();
  }
}

/** A hook may be refused and the engine goes on. */
function isRefusal(error: unknown): boolean {
  return (
    error instanceof MemtablesError &&
    ['INVALID_ARGUMENT', 'HOOK_REFUSED', 'SYMBOL_NOT_FOUND', 'SLACK_EXHAUSTED', 'IMAGE_INVALID'].includes(
      error.code,
    )
  );
}

const port = parentPort;
if (port === null) throw new Error('this module runs in a worker thread');
main(port, workerData as WorkerOptions)
  .then(
    () => port.postMessage({ type: 'ended' } satisfies WorkerMessage),
    (error: unknown) => port.postMessage({ type: 'ended', error: toPortable(error) } satisfies WorkerMessage),
  )
  .finally(() => port.close());

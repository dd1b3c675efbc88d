// The thread that listens with the engine, or with the binding alone; its loop is that of an attachment's worker.
import { type MessagePort, parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads';
import { DEFAULT_HANDLER, DEFAULT_THRESHOLD, DEFAULT_UNLOAD_SECONDS } from '../attachment/attachment.js';
import { findKernel } from '../attachment/find-kernel.js';
import { toPortable } from '../attachment/protocol.js';
import { Journal } from '../journal/journal.js';
import { openSession } from '../libvmi/open-session.js';
import type { LibvmiSession } from '../libvmi/session.js';
import { createHeartbeat } from '../libvmi/watchdog.js';
import { Engine } from '../memtables/engine.js';
import { loadProfile } from '../nt/profile.js';
import type { Gfn } from '../vmi/address.js';
import { HandlerTime } from './handler-time.js';
import type { ListenerCommand, ListenerMessage, ListenerOptions } from './protocol.js';

const LISTEN_MS = 20;

const options = workerData as ListenerOptions;
const port = parentPort as MessagePort;
const post = (message: ListenerMessage) => port.postMessage(message);

async function carryOut(command: ListenerCommand): Promise<void> {
  if (command.type === 'detach') return;
  const { name, socket, library } = options;
  const session = openSession({ name, socket, libraryPath: library, heartbeat: createHeartbeat() });
  try {
    if (command.type === 'engine') await withEngine(session);
    else withBinding(session, command.frames);
  } finally {
    session.close();
  }
  post({ type: 'detached' });
}

async function withEngine(session: LibvmiSession): Promise<void> {
  const profile = loadProfile(options.profile);
  const frames = observe(session, new HandlerTime(options.handlerTime));
  const kernel = await findKernel(session, profile);
  const { name, guid, age } = profile.pdb;
  const identity = { guest: options.name, kernelBase: kernel.base, pdb: `${name}/${guid}/${age}` };
  const journal = Journal.create(options.journal, identity, () => true);
  const engine = new Engine(session, kernel, journal, {
    threshold: DEFAULT_THRESHOLD,
    handler: DEFAULT_HANDLER,
    unloadSeconds: DEFAULT_UNLOAD_SECONDS,
    report: () => {},
  });
  try {
    for (const name of options.hooks) engine.hook(name);
    listen(session, [...frames], () => engine.work());
  } finally {
    engine.unload();
    journal.close();
  }
}

function withBinding(session: LibvmiSession, frames: readonly Gfn[]): void {
  session.onViolation(() => undefined);
  for (const gfn of frames) session.trapAccess(gfn);
  listen(session, frames, () => {});
}

/** Has the engine's handler timed; returns the frames that it traps. */
function observe(session: LibvmiSession, time: HandlerTime): ReadonlySet<Gfn> {
  const frames = new Set<Gfn>();
  const onViolation = session.onViolation.bind(session);
  const trapAccess = session.trapAccess.bind(session);
  session.onViolation = (handler, hidden) => onViolation(handler && time.around(handler), hidden);
  session.trapAccess = (gfn) => {
    trapAccess(gfn);
    frames.add(gfn);
  };
  return frames;
}

/** Until it is told to detach. */
function listen(session: LibvmiSession, frames: readonly Gfn[], work: () => void): void {
  post({ type: 'listening', frames });
  do {
    session.listen(LISTEN_MS);
    work();
  } while (receiveMessageOnPort(port) === undefined);
}

port.on('message', (command: ListenerCommand) => {
  carryOut(command).catch((error: unknown) => post({ type: 'failed', error: toPortable(error) }));
});

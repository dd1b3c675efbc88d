// The embedded host: a guest, a KVMI peer as QEMU and KVM are one, and a statistics channel.
import { randomBytes } from 'node:crypto';
import { aborted } from '../aborted.js';
import { type GuestArtefacts, readGuestArtefacts } from '../guest/artefacts.js';
import { lexerText } from '../guest/lexer-text.js';
import { type LoadedGuest, loadGuest } from '../guest/loader.js';
import { readGuestReport } from '../guest/report.js';
import { createMachine } from '../machine/create-machine.js';
import type { Machine } from '../machine/machine.js';
import { PeImage } from '../nt/pe.js';
import { isSocketAt } from '../socket-place.js';
import { snapshotImages } from './image-snapshot.js';
import { Introspection } from './introspection.js';
import { serveJsonLines } from './json-lines.js';
import { KvmiConnection } from './kvmi-connection.js';
import { RunLoop } from './run-loop.js';
import { hostStatistics } from './statistics.js';
import { ViolationCounters } from './violation-counters.js';

/** How the guest introduces itself to a tool. */
const GUEST_NAME = 'embedded';
const UUID_SIZE = 16;
const BYTES_PER_MB = 1024 * 1024;
/** The vector and period of the guest's clock interrupt. */
const TIMER_VECTOR = 0xd1;
const TIMER_MICROSECONDS = 1000;
/** So short that the lexer is through it in the seconds before a tool has placed its hooks. */
const LEXER_TEXT_BYTES = 32 * 1024;

export interface HostOptions {
  /** The introspection tool's unix socket; tried again until it exists. */
  readonly socket: string;
  readonly vcpus: number;
  readonly memoryMB: number;
  /** 32 bits. */
  readonly seed: number;
  /** Whether the guest has its module, where that has been fetched; by default it has. */
  readonly module?: boolean;
  /** Where the statistics channel listens; `SOCKET.stats` by default. */
  readonly statisticsPath?: string;
  /** Ends the host. */
  readonly signal: AbortSignal;
  /** Told what a person running the host wants to know. */
  readonly log?: (message: string) => void;
}

/**
 * Boots a guest and runs it until `signal` aborts.
 *
 * @throws MemtablesError `SETUP_INCOMPLETE` when machine or guest are not built, `INVALID_ARGUMENT` when one of the
 *   paths cannot be a socket's, `MACHINE_FAILED` when the guest cannot go on
 */
export async function runHost(options: HostOptions): Promise<void> {
  const artefacts = readGuestArtefacts();
  const machine = createMachine({ vcpus: options.vcpus, memoryBytes: options.memoryMB * BYTES_PER_MB });
  try {
    const { image, hal, module } = artefacts;
    const { seed, module: withModule = true } = options;
    const guest = loadGuest(machine, {
      image,
      hal,
      seed,
      ...(module && withModule && { module: { ...module, text: lexerText(seed, LEXER_TEXT_BYTES) } }),
    });
    machine.setTimer(TIMER_VECTOR, TIMER_MICROSECONDS);
    await serveGuest(machine, guest, artefacts, options);
  } finally {
    machine.close();
  }
}

/** Runs a guest that has been loaded until `signal` aborts; throws what the machine threw. */
export async function serveGuest(
  machine: Machine,
  guest: LoadedGuest,
  artefacts: Pick<GuestArtefacts, 'image' | 'hal' | 'sites' | 'module'>,
  options: Pick<HostOptions, 'socket' | 'statisticsPath' | 'signal' | 'log'>,
): Promise<void> {
  const { socket, statisticsPath = `${socket}.stats`, signal, log = () => {} } = options;
  isSocketAt(socket);
  const { sites, module } = artefacts;
  const images = {
    kernel: PeImage.fromFile(artefacts.image),
    hal: PeImage.fromFile(artefacts.hal),
    module: module && PeImage.fromFile(module.image),
  };
  const started = performance.now();
  const uptime = () => Math.round(performance.now() - started);
  const watched = [
    { base: guest.kernelBase, sites: sites.sites },
    ...(guest.module && module ? [{ base: guest.module.base, sites: module.sites }] : []),
  ];
  const counters = new ViolationCounters(machine, watched, uptime);
  const introspection = new Introspection(machine, counters);
  const stopStatistics = await serveJsonLines(statisticsPath, {
    statistics: () =>
      hostStatistics(uptime(), guest, introspection, counters.report(), readGuestReport(machine, guest)),
    image: () => snapshotImages(machine, guest, images),
  });
  const failure = new AbortController();
  const loop = new RunLoop(machine, introspection, (error) => failure.abort(error));
  const connection = new KvmiConnection({
    path: socket,
    introspection,
    name: GUEST_NAME,
    uuid: randomBytes(UUID_SIZE),
    onActivity: () => loop.wake(),
    onUnreachable: (error) => log(`no tool can be reached: ${error.message}`),
    onFailure: (error) => failure.abort(error),
    onState: (attached, reason) =>
      log(attached ? 'a tool has attached' : `the tool is gone${reason ? `: ${reason.message}` : ''}`),
  });
  log(`waiting for a tool on ${socket}; statistics on ${statisticsPath}`);
  try {
    await aborted(AbortSignal.any([signal, failure.signal]));
    failure.signal.throwIfAborted();
  } finally {
    loop.stop();
    connection.close();
    await stopStatistics();
  }
}

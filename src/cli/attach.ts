import { existsSync } from 'node:fs';
import { Attachment, journalOf } from '../attachment/attachment.js';
import { MemtablesError } from '../errors.js';
import type { EngineEvent } from '../memtables/report.js';
import { hex } from '../vmi/address.js';
import { EXIT } from './exit-codes.js';
import { exitNow } from './exit-now.js';
import { log, type Output } from './output.js';
import { aborted, stopRequest } from './stop.js';

export interface AttachCommandOptions {
  readonly name: string;
  readonly socket: string;
  readonly profile: string;
  readonly hook?: readonly string[];
  readonly time?: number;
  readonly threshold: number;
  readonly relocate: boolean;
  readonly unloadTimeout: number;
  readonly journal?: string;
  readonly libvmi?: string;
}

/**
 * Attaches, hooks, and waits for the time to pass or for Ctrl-C; then unloads.
 *
 * @throws MemtablesError of whatever failed; the guest has been restored then, as far as it still answers
 */
export async function attachCommand(options: AttachCommandOptions, output: Output): Promise<void> {
  if ((options.hook ?? []).length === 0) {
    throw new MemtablesError('INVALID_ARGUMENT', 'no hook was given, so no page would be trapped', {
      remedy: 'Name at least one function of the kernel: --hook nt!Name.',
    });
  }
  const journal = options.journal ?? journalOf(options.socket);
  const stop = stopRequest({
    code: EXIT.unload,
    message: `ended without unloading; ${journal} lists what is still in the guest`,
  });
  log.info(`waiting for the hypervisor on ${options.socket}`);
  const attachment = await open(options, stop);
  const { kernel } = attachment;
  output.result(
    { type: 'attached', ...kernel },
    `attached: ${kernel.pdb} at ${hex(kernel.base)}, ${kernel.vcpus} vCPUs`,
  );
  attachment.on('event', (event) => output.result(event, describe(event)));

  try {
    for (const name of options.hook ?? []) {
      if (!stop.aborted) await attachment.hook(name);
    }
    await Promise.race([aborted(stop), timeout(options.time), attachment.ended]);
    log.info('unloading');
    const statistics = await attachment.statistics();
    const unload = await attachment.unload();
    output.result(
      { type: 'summary', ...statistics, unload },
      [
        `unloaded in ${unload.seconds.toFixed(3)} s after ${unload.scans} scans (${unload.blocked} blocked)`,
        `  ${statistics.violations} violations, ${statistics.relocations} relocations, refused: ${counts(statistics.refused)}`,
        `  reads answered with original bytes: ${counts(statistics.cloakedReads)}`,
      ].join('\n'),
    );
  } catch (error) {
    // Undo what is there before saying what failed; a worker that has ended has tried to.
    await attachment.unload().catch(() => {});
    if (existsSync(journal)) log.warn(`changes are still in the guest; ${journal} lists them`);
    throw error;
  }
}

/** Ends the process when it is stopped while nobody has connected yet. */
async function open(options: AttachCommandOptions, stop: AbortSignal): Promise<Attachment> {
  try {
    return await Attachment.open({
      name: options.name,
      socket: options.socket,
      profile: options.profile,
      threshold: options.threshold,
      relocate: options.relocate,
      unloadSeconds: options.unloadTimeout,
      signal: stop,
      ...(options.journal === undefined ? {} : { journal: options.journal }),
      // The environment's may be empty.
      ...(options.libvmi ? { library: options.libvmi } : {}),
    });
  } catch (error) {
    if (!stop.aborted || error !== stop.reason) throw error;
    log.info('stopped before the hypervisor had connected; the guest was not touched');
    // A native call still waits for the hypervisor.
    return exitNow(EXIT.ok);
  }
}

/** One line for a person. */
export function describe(event: EngineEvent): string {
  switch (event.type) {
    case 'hooked':
      return `hooked ${event.name} at ${hex(event.function)}, ${event.replacedBytes} bytes moved to ${hex(event.trampoline)}`;
    case 'relocated':
      return `relocated ${event.form} load at ${hex(event.site)} (${event.entries} entries) to ${hex(event.handler)} after ${event.hits} hits`;
    case 'refused':
      return `left the load at ${hex(event.site)} alone: ${event.reason}`;
    case 'taken-back':
      return `the guest wrote over ${event.owner} at ${hex(event.at)}: taken back`;
    case 'unload-blocked':
      return `cannot unload yet: ${event.where.join('; ')}`;
  }
}

export function counts(byName: Readonly<Record<string, number>>): string {
  const parts = Object.entries(byName).map(([name, count]) => `${name} ${count}`);
  return parts.length === 0 ? 'none' : parts.join(', ');
}

/** Resolves after so many seconds; without a number never. */
function timeout(seconds: number | undefined): Promise<void> {
  return new Promise((resolve) => {
    if (seconds !== undefined) setTimeout(resolve, seconds * 1000).unref();
  });
}

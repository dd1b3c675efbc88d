import { aborted } from '../aborted.js';
import { Attachment, journalOf } from '../attachment/attachment.js';
import { assertFunctionsKnown } from '../attachment/known-functions.js';
import { undoFailed } from '../attachment/undo-failed.js';
import { MemtablesError } from '../errors.js';
import type { HandlerChoice } from '../handlers/planner.js';
import { loadProfile } from '../nt/profile.js';
import { hex } from '../vmi/address.js';
import { counts, describeEvents, inMilliseconds, plural } from './describe.js';
import { EXIT } from './exit-codes.js';
import { exitNow } from './exit-now.js';
import { log, type Output } from './output.js';
import { stopRequest } from './stop.js';

export interface AttachCommandOptions {
  readonly name: string;
  readonly socket?: string;
  readonly xen?: boolean;
  readonly profile: string;
  readonly hook?: readonly string[];
  readonly time?: number;
  readonly threshold: number;
  readonly ahead?: boolean;
  readonly handler: HandlerChoice;
  readonly relocate: boolean;
  readonly unloadTimeout: number;
  readonly stuckAfter: number;
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
  const isOnXen = options.xen ?? false;
  if ((options.socket === undefined) !== isOnXen) {
    const what = isOnXen ? '-s and --xen exclude each other' : 'where the VM runs was not said';
    throw new MemtablesError('INVALID_ARGUMENT', what, {
      remedy: 'For a VM on KVM name the socket (-s), for one on Xen write --xen.',
    });
  }
  assertFunctionsKnown(options.hook ?? [], loadProfile(options.profile));
  const journal = options.journal ?? journalOf(options);
  const stop = stopRequest({
    code: EXIT.unload,
    message: `ended without unloading; ${journal} lists what is still in the guest`,
  });
  const attachment = await open(options, stop);
  const { kernel } = attachment;
  output.result(
    { type: 'attached', ...kernel },
    `attached: ${kernel.pdb} at ${hex(kernel.base)}, ${plural(kernel.modules, 'other module')}, ${plural(kernel.vcpus, 'vCPU')}, through ${kernel.library}`,
  );
  const describe = describeEvents();
  attachment.on('event', (event) => output.result(event, describe(event)));

  try {
    for (const name of options.hook ?? []) {
      if (!stop.aborted) await attachment.hook(name);
    }
    await Promise.race([aborted(stop), timeout(options.time), attachment.ended]);
    log.info('unloading');
    const statistics = await attachment.statistics();
    const unload = inMilliseconds(await attachment.unload());
    output.result(
      { type: 'summary', ...statistics, unload },
      [
        `unloaded in ${unload.seconds.toFixed(3)} s after ${plural(unload.scans, 'scan')} (${unload.blocked} blocked)`,
        `  ${plural(statistics.violations, 'violation')}, ${plural(statistics.relocations, 'relocation')}, refused: ${counts(statistics.refused)}`,
        `  table loads: ${statistics.tableLoads}; other reads: ${statistics.otherReads.reads}`,
        `  reads answered with original bytes: ${counts(statistics.cloakedReads)}`,
      ].join('\n'),
    );
  } catch (error) {
    throw await undo(attachment, error);
  }
}

/** Takes back what is there after `error`; returns what the user has to hear of. */
async function undo(attachment: Attachment, error: unknown): Promise<unknown> {
  try {
    await attachment.unload();
    return error;
  } catch (failure) {
    // The same one: it had ended the attachment.
    return failure === error ? error : undoFailed(failure, error);
  }
}

/** Ends the process when it is stopped while nobody has connected yet. */
async function open(options: AttachCommandOptions, stop: AbortSignal): Promise<Attachment> {
  try {
    return await Attachment.open({
      name: options.name,
      profile: options.profile,
      threshold: options.threshold,
      handler: options.handler,
      relocate: options.relocate,
      ahead: options.ahead ?? false,
      unloadSeconds: options.unloadTimeout,
      stuckAfterSeconds: options.stuckAfter,
      onWaiting: () =>
        log.info(options.xen ? 'connecting to Xen' : `waiting for the hypervisor on ${options.socket}`),
      signal: stop,
      ...(options.socket === undefined ? {} : { socket: options.socket }),
      ...(options.journal === undefined ? {} : { journal: options.journal }),
      ...(options.libvmi === undefined ? {} : { library: options.libvmi }),
    });
  } catch (error) {
    if (!stop.aborted || error !== stop.reason) throw error;
    log.info('stopped before the hypervisor had connected; the guest was not touched');
    // A native call still waits for the hypervisor.
    return exitNow(EXIT.ok);
  }
}

/** Resolves after so many seconds; without a number never. */
function timeout(seconds: number | undefined): Promise<void> {
  return new Promise((resolve) => {
    if (seconds !== undefined) setTimeout(resolve, seconds * 1000).unref();
  });
}

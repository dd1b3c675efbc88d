import { type DemoSummary, demoFailed, runDemo } from '../demo/demo.js';
import { FORMS, type Phase, rate } from '../demo/phase.js';
import { MemtablesError } from '../errors.js';
import { counts, describe } from './attach.js';
import { EXIT } from './exit-codes.js';
import { randomSeed } from './host.js';
import { log, type Output } from './output.js';
import { stopRequest } from './stop.js';

export interface DemoCommandOptions {
  readonly vcpus: number;
  readonly seconds: number;
  readonly seed?: number;
  readonly hook?: readonly string[];
  readonly libvmi?: string;
}

/**
 * Runs the demo and prints its figures.
 *
 * @throws MemtablesError of whatever failed; `DEMO_FAILED` when the run did not show what it has to
 */
export async function demoCommand(options: DemoCommandOptions, output: Output): Promise<void> {
  const seed = options.seed ?? randomSeed();
  const stop = stopRequest({
    code: EXIT.internal,
    message: 'ended without unloading; the guest ends with the demo',
  });
  log.info(`starting an embedded host with ${options.vcpus} vCPUs, seed ${seed}`);
  const { summary, shortcomings } = await runDemo(
    {
      vcpus: options.vcpus,
      seconds: options.seconds,
      seed,
      hooks: options.hook,
      library: options.libvmi || undefined,
    },
    {
      event: (event) => output.result(event, `  ${describe(event)}`),
      phaseBegins: (name) => log.info(`phase '${name}', ${options.seconds} s`),
      phaseGoesOn: (name) =>
        log.info(`phase '${name}' goes on until the guest's integrity checker has been through once`),
      phaseEnded: (name, phase) =>
        output.result({ type: 'phase', name, ...phase }, describePhase(name, phase)),
    },
    stop,
  ).catch((error: unknown) => {
    throw stop.aborted ? demoStopped(stop.reason) : error;
  });
  output.result({ type: 'summary', ...summary }, describeSummary(summary));
  if (shortcomings.length > 0) throw demoFailed(seed, shortcomings);
}

function demoStopped(cause: unknown): MemtablesError {
  return new MemtablesError('DEMO_FAILED', 'the demo was stopped before it was through', {
    remedy: 'Run it again and let it finish; --seconds makes it shorter.',
    cause,
  });
}

function describePhase(name: string, phase: Phase): string {
  const forms = FORMS.map((form) => {
    const { readViolations } = phase.byForm[form];
    return `${form} ${Math.round(rate(phase, form)).toLocaleString('en')}/s (${readViolations} trapped)`;
  });
  return `${name}: switches ${forms.join(', ')}; ${phase.integritySweeps} integrity sweeps`;
}

function describeSummary({ phases, unload, guest, ...summary }: DemoSummary): string {
  const speedup = rate(phases.relocated, 'one-level') / rate(phases.hooked, 'one-level');
  const ofUnhooked = rate(phases.relocated, 'one-level') / rate(phases.unhooked, 'one-level');
  return [
    '',
    `${summary.hooks} hooks hidden, ${summary.relocations} table loads relocated; left alone: ${counts(summary.refused)}`,
    `one-level switches: ${speedup.toFixed(0)} times as fast as with trapped tables, ${ofUnhooked.toFixed(2)} of the unhooked rate`,
    `reads answered with original bytes: ${counts(summary.cloakedReads)}; stale events: ${summary.staleEvents}`,
    `unloaded after ${unload.scans} thread scans (${unload.blocked} blocked) in ${unload.seconds.toFixed(3)} s`,
    `the guest: checksums ${guest.checksumOk ? 'right' : 'WRONG'}, ${guest.integritySweeps} integrity sweeps with ` +
      `${guest.integrityMismatches} mismatches, ${guest.identicalAfterUnload ? 'identical' : 'DIFFERENT'} after unload`,
  ].join('\n');
}

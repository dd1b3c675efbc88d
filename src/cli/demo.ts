import { type DemoSummary, demoFailed, runDemo } from '../demo/demo.js';
import { FORMS, type Phase, rate } from '../demo/phase.js';
import { MemtablesError } from '../errors.js';
import type { HandlerChoice } from '../handlers/planner.js';
import type { EngineEvent } from '../memtables/report.js';
import { counts, describeEvents, inMilliseconds, plural } from './describe.js';
import { EXIT } from './exit-codes.js';
import { randomSeed } from './host.js';
import { log, type Output } from './output.js';
import { stopRequest } from './stop.js';

const COUNTED: ReadonlySet<EngineEvent['type']> = new Set(['relocated', 'refused']);

export interface DemoCommandOptions {
  readonly vcpus: number;
  readonly seconds: number;
  readonly seed?: number;
  readonly hook?: readonly string[];
  readonly handler: HandlerChoice;
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
  log.info(`starting an embedded host with ${plural(options.vcpus, 'vCPU')}, seed ${seed}`);
  const describe = describeEvents();
  const { summary, shortcomings } = await runDemo(
    {
      vcpus: options.vcpus,
      seconds: options.seconds,
      seed,
      hooks: options.hook,
      handler: options.handler,
      library: options.libvmi,
    },
    {
      // Dozens of table loads: for a person the summary counts them.
      event: (event) => output.result(event, COUNTED.has(event.type) ? undefined : describe(event)),
      phaseBegins: (name) => log.info(`phase '${name}', ${options.seconds} s`),
      phaseGoesOn: (name) =>
        log.info(
          `phase '${name}' goes on until the guest's integrity checker and its lexer have been through once`,
        ),
      phaseEnded: (name, phase) =>
        output.result({ type: 'phase', name, ...phase }, describePhase(name, phase)),
    },
    stop,
  ).catch((error: unknown) => {
    throw stop.aborted ? demoStopped(stop.reason) : error;
  });
  const unload = inMilliseconds(summary.unload);
  output.result({ type: 'summary', ...summary, unload }, describeSummary(summary));
  if (shortcomings.length > 0) throw demoFailed(seed, shortcomings);
}

function demoStopped(cause: unknown): MemtablesError {
  return new MemtablesError('DEMO_FAILED', 'the demo was stopped before it was through', {
    remedy: 'Run it again and let it finish; --seconds makes it shorter.',
    cause,
  });
}

function describePhase(name: string, phase: Phase): string {
  const switches = Math.round(phase.switches / phase.seconds);
  return `${name}: ${plural(switches, 'switch', 'switches')}/s, ${plural(phase.integritySweeps, 'integrity sweep')}`;
}

/** A row for each phase; for each form of a switch that ran, how many a second, and how many table loads were trapped. */
function phaseTable(phases: DemoSummary['phases']): string[] {
  const cell = (text: string | number, width: number) => text.toLocaleString('en').padStart(width);
  const row = (name: string, cells: (string | number)[]) =>
    name.padEnd(9) + cells.map((text, index) => cell(text, index % 2 === 0 ? 13 : 9)).join('');
  const forms = FORMS.filter((form) =>
    Object.values(phases).some((phase) => phase.byForm[form].switches > 0),
  );
  return [
    ''.padEnd(9) + forms.map((form) => form.padStart(22)).join(''),
    row(
      '',
      forms.flatMap(() => ['switches/s', 'trapped']),
    ),
    ...Object.entries(phases).map(([name, phase]) =>
      row(
        name,
        forms.flatMap((form) => [Math.round(rate(phase, form)), phase.byForm[form].readViolations]),
      ),
    ),
  ];
}

function describeLexer(lexer: DemoSummary['guest']['lexer']): string {
  if (lexer === undefined) return 'no real code ran in the guest: `npm run binaries` fetches it';
  return (
    `the lexer of tree-sitter-c.node: ${plural(lexer.pieces, 'piece')} of text, ${plural(lexer.tokens, 'token')}, ` +
    (lexer.mismatches === 0 ? 'the same in every phase' : `DIFFERENT in ${plural(lexer.mismatches, 'piece')}`)
  );
}

function describeSummary({ phases, unload, guest, ...summary }: DemoSummary): string {
  const { sites } = summary;
  return [
    '',
    ...phaseTable(phases),
    '',
    `${plural(summary.hooks, 'hook')} hidden, ${plural(summary.relocations, 'switch', 'switches')} relocated (${counts(summary.encoders)}); left alone: ${counts(summary.refused)}`,
    `of the kernel's ${sites.listed} switches ${sites.relocated} were relocated, ${sites.undecided} did not become hot`,
    ...(['one-level', 'two-level'] as const).flatMap((form) => {
      if (phases.hooked.byForm[form].readViolations === 0) return [];
      const relative = (name: 'hooked' | 'unhooked') =>
        rate(phases.relocated, form) / rate(phases[name], form);
      return [
        `${form} switches: ${relative('hooked').toFixed(0)} times as fast as with trapped tables, ${relative('unhooked').toFixed(2)} of the unhooked rate`,
      ];
    }),
    `reads answered with original bytes: ${counts(summary.cloakedReads)}; stale events: ${summary.staleEvents}`,
    `unloaded after ${plural(unload.scans, 'thread scan')} (${unload.blocked} blocked) in ${unload.seconds.toFixed(3)} s`,
    describeLexer(guest.lexer),
    `the guest: checksums ${guest.checksumOk ? 'right' : 'WRONG'}, ${plural(guest.integritySweeps, 'integrity sweep')} with ` +
      `${plural(guest.integrityMismatches, 'mismatch', 'mismatches')}, ${guest.identicalAfterUnload ? 'identical' : 'DIFFERENT'} after unload`,
  ].join('\n');
}

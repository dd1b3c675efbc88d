// What the main job tells while it runs, and its figures, in words and as records.
import type { MainJobProgress, MainJobSummary } from '../demo/main-job.js';
import { FORMS, type Phase, rate } from '../demo/phase.js';
import type { EngineEvent } from '../memtables/report.js';
import { counts, describeEvents, plural } from './describe.js';

/** Dozens of table loads: for a person the summary counts them. */
const COUNTED: ReadonlySet<EngineEvent['type']> = new Set(['relocated', 'refused']);

/** A result in both forms: a record for a program, and a text for a person, where that has something to say. */
type Results = (record: Readonly<Record<string, unknown>>, text: string | undefined) => void;

/** Passes on what a job with phases of `seconds` tells: its results, and what is worth a line in a log. */
export function describedProgress(
  seconds: number,
  result: Results,
  log: (message: string) => void,
): MainJobProgress {
  const describe = describeEvents();
  return {
    event: (event) => result(event, COUNTED.has(event.type) ? undefined : describe(event)),
    phaseBegins: (name) => log(`phase '${name}', ${seconds} s`),
    relocatingBegins: () => log('relocating what is hot'),
    phaseGoesOn: (name) => log(`phase '${name}' goes on until the guest has looked at all of itself once`),
    phaseEnded: (name, phase) => result({ type: 'phase', name, ...phase }, describePhase(name, phase)),
  };
}

function describePhase(name: string, phase: Phase): string {
  const switches = Math.round(phase.switches / phase.seconds);
  return `${name}: ${plural(switches, 'switch', 'switches')}/s, ${plural(phase.integritySweeps, 'integrity sweep')}`;
}

/** A row for each phase; for each form of a switch that ran, how many a second, and how many table loads were trapped. */
function phaseTable(phases: MainJobSummary['phases']): string[] {
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

function describeLexer({
  pieces,
  tokens,
  mismatches,
}: NonNullable<MainJobSummary['guest']['lexer']>): string {
  return (
    `the lexer of tree-sitter-c.node: ${plural(pieces, 'piece')} of text, ${plural(tokens, 'token')}, ` +
    (mismatches === 0 ? 'the same in every phase' : `DIFFERENT in ${plural(mismatches, 'piece')}`)
  );
}

export function describeSummary({ phases, unload, guest, ...summary }: MainJobSummary): string {
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
    ...(guest.lexer === undefined ? [] : [describeLexer(guest.lexer)]),
    `the guest: checksums ${guest.checksumOk ? 'right' : 'WRONG'}, ${plural(guest.integritySweeps, 'integrity sweep')} with ` +
      `${plural(guest.integrityMismatches, 'mismatch', 'mismatches')}, ${guest.identicalAfterUnload ? 'identical' : 'DIFFERENT'} after unload`,
  ].join('\n');
}

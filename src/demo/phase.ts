import type { SwitchForm } from '../guest/artefacts.js';
import type { BedStatistics } from './bed.js';

export const FORMS = [
  'one-level',
  'two-level',
  'look-alike',
  'lexer',
] as const satisfies readonly SwitchForm[];

export interface FormCounts {
  /** Counted by the guest itself. */
  readonly switches: number;
  /** Trapped table loads of the workload, counted by the host. */
  readonly readViolations: number;
}

/** What happened in one phase of the demo. */
export interface Phase extends FormCounts {
  readonly seconds: number;
  readonly byForm: Readonly<Record<SwitchForm, FormCounts>>;
  /** Sweeps of the guest's integrity checker that began and ended in the phase. */
  readonly integritySweeps: number;
  /** Pieces of its text that the lexer has begun and ended in the phase; 0 where the guest has no module. */
  readonly lexerPieces: number;
}

/** The difference between two looks at the bed. */
export function phaseBetween(from: BedStatistics, to: BedStatistics): Phase {
  const counts = (form: SwitchForm): FormCounts => ({
    switches: switchesOf(to, form) - switchesOf(from, form),
    readViolations: readViolationsOf(to, form) - readViolationsOf(from, form),
  });
  const byForm = {
    'one-level': counts('one-level'),
    'two-level': counts('two-level'),
    'look-alike': counts('look-alike'),
    lexer: counts('lexer'),
  };
  return {
    seconds: secondsBetween(from, to),
    switches: sum(FORMS.map((form) => byForm[form].switches)),
    readViolations: sum(FORMS.map((form) => byForm[form].readViolations)),
    byForm,
    integritySweeps: fullSweeps(from, to),
    lexerPieces: fullPieces(from, to),
  };
}

export function secondsBetween(from: BedStatistics, to: BedStatistics): number {
  return (to.uptimeMs - from.uptimeMs) / 1000;
}

export function fullSweeps(from: BedStatistics, to: BedStatistics): number {
  return begunAndEnded(from, to, (guest) => guest.integritySweeps);
}

export function fullPieces(from: BedStatistics, to: BedStatistics): number {
  return begunAndEnded(from, to, (guest) => guest.lexer?.pieces ?? 0);
}

/** The one that ended first had begun before `from`. */
function begunAndEnded(
  from: BedStatistics,
  to: BedStatistics,
  count: (guest: NonNullable<BedStatistics['guest']>) => number,
): number {
  const ended = (to.guest ? count(to.guest) : 0) - (from.guest ? count(from.guest) : 0);
  return Math.max(0, ended - 1);
}

/** Switches a second. */
export function rate(phase: Phase, form: SwitchForm): number {
  return phase.byForm[form].switches / phase.seconds;
}

function switchesOf(statistics: BedStatistics, form: SwitchForm): number {
  return statistics.guest?.switches[form] ?? 0;
}

function readViolationsOf(statistics: BedStatistics, form: SwitchForm): number {
  return sum(statistics.violations.sites.filter((site) => site.form === form).map((site) => site.violations));
}

export function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, number) => total + number, 0);
}

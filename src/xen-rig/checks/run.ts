// The conformance suite on Xen: what a library with libvmi's C ABI has to do with a domain, one named check after the
// other. The checks of test/conformance, which run against a scripted peer, are the model.
import { basename, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { stripVTControlCharacters } from 'node:util';
import { PROJECT_IN_DOM0 } from '../dom0-init.js';
import type { Dom0Line } from '../report.js';
import { ATTACHING } from './attaching.js';
import { Bench, type Check } from './bench.js';
import { EMULATION } from './emulation.js';
import { ENDING } from './ending.js';
import { EVENTS } from './events.js';
import { MEMORY } from './memory.js';
import { DEFINED_OTHERWISE } from './otherwise.js';
import { PAUSING } from './pausing.js';
import { REGISTERS } from './registers.js';
import { STEPS } from './steps.js';
import { TRANSLATION } from './translation.js';

/** In dom0. */
const PROGRAM = join(PROJECT_IN_DOM0, 'build/Release/abi-check');
const MOST_MS = 60_000;

const CHECKS: readonly Check[] = [
  ...ATTACHING,
  ...MEMORY,
  ...TRANSLATION,
  ...REGISTERS,
  ...PAUSING,
  ...EVENTS,
  ...EMULATION,
  ...STEPS,
  ...ENDING,
];

interface CheckRecord {
  readonly type: 'check';
  readonly name: string;
  readonly passed?: boolean;
  readonly skipped?: string;
  readonly reason?: string;
  /** By dom0's clock. */
  readonly ms?: number;
}

/** Runs every check with `library`; returns what did not hold. */
export async function runChecks(
  library: string,
  folder: string,
  report: (line: Dom0Line) => void,
): Promise<readonly string[]> {
  for (const { name, reason } of DEFINED_OTHERWISE)
    report({
      type: 'result',
      record: { type: 'check', name, skipped: reason } satisfies CheckRecord,
      text: `otherwise  ${name}: ${reason}`,
    });
  const bench = new Bench(PROGRAM, library, folder);
  const isLibvmi = basename(library).startsWith('libvmi');
  const failed: string[] = [];
  const counts = { passed: 0, failed: 0, skipped: 0, otherwise: DEFINED_OTHERWISE.length };
  for (const check of CHECKS) {
    const record: CheckRecord =
      check.notByLibvmi !== undefined && isLibvmi
        ? ({ type: 'check', name: check.name, skipped: check.notByLibvmi } satisfies CheckRecord)
        : await outcomeOf(bench, check);
    const how = record.skipped !== undefined ? 'skipped' : record.passed ? 'passed' : 'failed';
    counts[how]++;
    if (how === 'failed') failed.push(`${check.name}: ${record.reason}`);
    const why = record.skipped ?? record.reason;
    report({
      type: 'result',
      record,
      text: `${how.padEnd(9)}  ${check.name}${why === undefined ? '' : `: ${why}`}`,
    });
  }
  await bench.cleanUp();
  report({
    type: 'result',
    record: { type: 'summary', checks: CHECKS.length, ...counts },
    text: `${CHECKS.length} checks: ${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped; ${counts.otherwise} groups that Xen defines otherwise`,
  });
  return failed;
}

async function outcomeOf(bench: Bench, { name, run }: Check): Promise<CheckRecord> {
  const started = performance.now();
  const record = () => ({ type: 'check', name, ms: Math.round(performance.now() - started) }) as const;
  try {
    const skipped = await Promise.race([
      (async () => {
        const reason = await run(bench);
        await bench.endPrograms();
        return reason;
      })(),
      sleep(MOST_MS, undefined, { ref: false }).then(() => {
        throw new Error('it does not come to an end');
      }),
    ]);
    return { ...record(), ...(skipped === undefined ? { passed: true } : { skipped }) };
  } catch (error) {
    const failure = {
      ...record(),
      passed: false,
      reason: stripVTControlCharacters(error instanceof Error ? error.message : String(error)),
    };
    await bench.cleanUp();
    return failure;
  }
}

import { setTimeout as sleep } from 'node:timers/promises';
import { fromPortable } from '../attachment/protocol.js';
import { MemtablesError } from '../errors.js';
import { type BootFacts, BootStages } from './boot-stages.js';
import { GrowingFile } from './growing-file.js';
import type { Dom0Line } from './report.js';

/** A machine that runs, as far as who watches it has to know. */
export interface RunningMachine {
  /** Resolves when it has ended, with how. */
  readonly ended: Promise<string>;
}

export interface WatchedFiles {
  readonly console: string;
  readonly results: string;
}

export interface Watcher {
  stage(text: string): void;
  result(record: object, text: string | undefined): void;
}

export interface Judgement {
  readonly facts: BootFacts;
  readonly shortcomings: readonly string[];
}

const POLL_MS = 200;

/**
 * Follows a run until it has been judged.
 *
 * @throws MemtablesError `RIG_FAILED` when the machine ends before, or the time is over; what dom0 reports as an
 *   error; the reason of `signal`
 */
export async function watch(
  machine: RunningMachine,
  files: WatchedFiles,
  limitSeconds: number,
  watcher: Watcher,
  signal: AbortSignal,
): Promise<Judgement> {
  const stages = new BootStages();
  const consoleFile = new GrowingFile(files.console);
  const resultsFile = new GrowingFile(files.results);
  let last = 'nothing yet';
  let ending: string | undefined;
  machine.ended.then((how) => {
    ending = how;
  });
  const failed = (what: string, remedy: string) =>
    new MemtablesError('RIG_FAILED', `${what}; the last stage was: ${last}`, {
      remedy,
      context: { console: files.console, results: files.results },
    });
  const reached = (text: string) => {
    last = text;
    watcher.stage(text);
  };
  const end = performance.now() + limitSeconds * 1000;
  try {
    for (;;) {
      // What it wrote before it ended is read after that is known.
      const ended = ending;
      for (const line of consoleFile.newLines()) {
        const stage = stages.recognise(line);
        if (stage !== undefined) reached(stage);
      }
      for (const line of resultsFile.newLines().map(parse)) {
        if (line === undefined) continue;
        if (line.type === 'judged') return { facts: stages.facts, shortcomings: line.shortcomings };
        if (line.type === 'error') throw fromPortable(line.error);
        if (line.type === 'stage') reached(line.text);
        else watcher.result(line.record, line.text);
      }
      if (ended !== undefined) {
        throw failed(`the machine ended (${ended}) before dom0 had reported`, 'Look at the console log.');
      }
      if (performance.now() > end) {
        throw failed(
          `the run was not through within ${limitSeconds} s`,
          'Let nothing else run meanwhile (it takes two cores), or look at the console log for where it hangs.',
        );
      }
      await sleep(POLL_MS, undefined, { signal });
    }
  } finally {
    consoleFile.close();
    resultsFile.close();
  }
}

/** A line that got damaged is not worth a failure: without its last one, a run fails anyway. */
function parse(line: string): Dom0Line | undefined {
  try {
    return JSON.parse(line);
  } catch {
    return undefined;
  }
}

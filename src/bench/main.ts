#!/usr/bin/env node
import { Option } from 'commander';
import { json, library, seconds } from '../cli/options.js';
import { Output } from '../cli/output.js';
import { run } from '../cli/run.js';
import { benchmark, rounds } from './benchmark.js';

const DESCRIPTION =
  'Measure how many trapped reads a second the engine answers, against a bare listener in C on the same library ' +
  'and the same embedded host, and what the time of one consists of.';

await benchmark('bench:events', DESCRIPTION, '--seconds 2')
  .addOption(
    new Option('--seconds <n>', 'length of each measurement; a round has three')
      .argParser(seconds)
      .default(0.3),
  )
  .addOption(rounds())
  .addOption(library())
  .addOption(json())
  .action((options) =>
    run(async () => {
      const { eventsCommand } = await import('./command.js');
      await eventsCommand(options, new Output(options.json ?? false));
    }),
  )
  .parseAsync();

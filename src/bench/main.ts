#!/usr/bin/env node
import { Command, Option } from 'commander';
import { EXIT, EXIT_CODE_HELP } from '../cli/exit-codes.js';
import { integer, json, library, seconds } from '../cli/options.js';
import { Output } from '../cli/output.js';
import { run } from '../cli/run.js';

await new Command('bench:events')
  .description(
    'Measure how many trapped reads a second the engine answers, against a bare listener in C on the same library ' +
      'and the same embedded host, and what the time of one consists of.',
  )
  .addOption(
    new Option('--seconds <n>', 'length of each measurement; a round has three')
      .argParser(seconds)
      .default(0.3),
  )
  .addOption(
    new Option('--rounds <n>', 'rounds; the figures are medians over them')
      .argParser(integer(1, 1000))
      .default(15),
  )
  .addOption(library())
  .addOption(json())
  .addHelpText(
    'after',
    '\nExample:\n  npm run bench:events -- --seconds 2\n\ndocs/benchmarks.md says how to read it.',
  )
  .addHelpText('after', EXIT_CODE_HELP)
  .exitOverride((error) => process.exit(error.exitCode === 0 ? EXIT.ok : EXIT.usage))
  .showHelpAfterError('(see --help)')
  .action((options) =>
    run(async () => {
      const { eventsCommand } = await import('./command.js');
      await eventsCommand(options, new Output(options.json ?? false));
    }),
  )
  .parseAsync();

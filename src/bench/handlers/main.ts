#!/usr/bin/env node
import { Command, Option } from 'commander';
import { EXIT, EXIT_CODE_HELP } from '../../cli/exit-codes.js';
import { integer, json } from '../../cli/options.js';
import { Output } from '../../cli/output.js';
import { run } from '../../cli/run.js';

await new Command('bench:handlers')
  .description(
    'Run switches with each kind of handler natively on this processor, and compare the cycles of one with those of ' +
      'the untouched switch.',
  )
  .addOption(
    new Option('--rounds <n>', 'rounds; the figures are medians over them')
      .argParser(integer(1, 1000))
      .default(15),
  )
  .addOption(json())
  .addHelpText(
    'after',
    '\nExample:\n  npm run bench:handlers -- --rounds 50\n\ndocs/benchmarks.md says how to read it.',
  )
  .addHelpText('after', EXIT_CODE_HELP)
  .exitOverride((error) => process.exit(error.exitCode === 0 ? EXIT.ok : EXIT.usage))
  .showHelpAfterError('(see --help)')
  .action((options) =>
    run(async () => {
      const { handlersCommand } = await import('./command.js');
      await handlersCommand(options, new Output(options.json ?? false));
    }),
  )
  .parseAsync();

#!/usr/bin/env node
import { json } from '../../cli/options.js';
import { Output } from '../../cli/output.js';
import { run } from '../../cli/run.js';
import { benchmark, rounds } from '../benchmark.js';

const DESCRIPTION =
  'Run switches with each kind of handler natively on this processor, and compare the cycles of one with those of ' +
  'the untouched switch.';

await benchmark('bench:handlers', DESCRIPTION, '--rounds 50')
  .addOption(rounds())
  .addOption(json())
  .action((options) =>
    run(async () => {
      const { handlersCommand } = await import('./command.js');
      await handlersCommand(options, new Output(options.json ?? false));
    }),
  )
  .parseAsync();

#!/usr/bin/env node
import { Command, Option } from 'commander';
import { EXIT_CODE_HELP } from '../cli/exit-codes.js';
import { integer, json } from '../cli/options.js';
import { Output } from '../cli/output.js';
import { exitAsDocumented, run } from '../cli/run.js';
import { rigCommand } from './command.js';

await new Command('test:xen')
  .description(
    'Boot Xen with dom0 on an emulated machine with EPT, attach there to an NT-like guest, measure three phases, ' +
      'unload, and prove that the guest is as it was.',
  )
  .addOption(
    new Option(
      '--libvmi-prefix <dir>',
      "where libvmi is installed, with its Xen driver (default: the project's own library)",
    ),
  )
  .addOption(new Option('--prepare', 'only download and unpack the Debian packages'))
  .addOption(
    new Option('--vcpus <n>', 'virtual CPUs of the guest; each makes the run longer')
      .argParser(integer(1, 8))
      .default(1),
  )
  .option('--conformance', 'check instead, one by one, what the library does on Xen')
  .addOption(json())
  .addHelpText('after', EXIT_CODE_HELP)
  .exitOverride(exitAsDocumented)
  .showHelpAfterError('(see --help)')
  .action((options) => run(() => rigCommand(options, new Output(options.json ?? false))))
  .parseAsync();

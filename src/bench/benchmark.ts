// What every benchmark's command has.
import { Command, Option } from 'commander';
import { EXIT_CODE_HELP } from '../cli/exit-codes.js';
import { integer } from '../cli/options.js';
import { exitAsDocumented } from '../cli/run.js';
import { MemtablesError } from '../errors.js';

/** The command `npm run NAME`; options and action are its own. */
export function benchmark(name: string, description: string, example: string): Command {
  return new Command(name)
    .description(description)
    .addHelpText(
      'after',
      `\nExample:\n  npm run ${name} -- ${example}\n\ndocs/benchmarks.md says how to read it.`,
    )
    .addHelpText('after', EXIT_CODE_HELP)
    .exitOverride(exitAsDocumented)
    .showHelpAfterError('(see --help)');
}

export const rounds = () =>
  new Option('--rounds <n>', 'rounds; the figures are medians over them')
    .argParser(integer(1, 1000))
    .default(15);

/** @param shorter what makes it shorter */
export function stopped(shorter: string, cause: unknown): MemtablesError {
  return new MemtablesError('BENCH_FAILED', 'the benchmark was stopped before it was through', {
    remedy: `Run it again and let it finish; ${shorter} it shorter.`,
    cause,
  });
}

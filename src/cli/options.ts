// Options and arguments that more than one command has.
import { InvalidArgumentError, Option } from 'commander';
import { DEFAULT_HANDLER } from '../attachment/attachment.js';
import { HANDLER_CHOICES } from '../handlers/planner.js';

export function integer(minimum: number, maximum: number) {
  return (text: string): number => {
    const value = Number(text);
    if (!/^\d+$/.test(text) || value < minimum || value > maximum) {
      throw new InvalidArgumentError(`Expected a whole number from ${minimum} to ${maximum}.`);
    }
    return value;
  };
}

export function seconds(text: string): number {
  const value = Number(text);
  if (!/^\d+(\.\d+)?$/.test(text) || value <= 0 || value > 86_400) {
    throw new InvalidArgumentError('Expected a number of seconds, up to 86400.');
  }
  return value;
}

/** An unset variable of a shell must not choose another library than the user thinks. */
function notEmpty(text: string): string {
  if (text === '') throw new InvalidArgumentError('Expected a path.');
  return text;
}

export const seed = () =>
  new Option('--seed <n>', "decides the guest's layout and what its workload does").argParser(
    integer(0, 0xffffffff),
  );
export const handler = () =>
  new Option('--handler <kind>', 'what hot table loads are replaced by; auto: the fastest that fits')
    .choices(HANDLER_CHOICES)
    .default(DEFAULT_HANDLER);
export const json = () => new Option('--json', 'print JSON lines instead of text');
export const library = () =>
  new Option(
    '--libvmi <path>',
    "library with libvmi's C ABI (default: MEMTABLES_LIBVMI, else the bundled one, else an installed one)",
  ).argParser(notEmpty);

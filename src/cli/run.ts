import { setImmediate as turn } from 'node:timers/promises';
import { MemtablesError } from '../errors.js';
import { EXIT } from './exit-codes.js';
import { exitNow } from './exit-now.js';
import { assertResultsWritten, reportError } from './output.js';

/** For commander: ends the process with an exit code of ours. */
export function exitAsDocumented({ exitCode }: { readonly exitCode: number }): never {
  process.exit(exitCode === 0 ? EXIT.ok : EXIT.usage);
}

/**
 * Runs a command, and reports what it throws. A command is loaded when it is used: the decoder alone takes as long as
 * the rest of a `--help`.
 */
export async function run(action: () => Promise<void>): Promise<void> {
  try {
    await action();
    // A failed write is told of a turn later.
    await turn();
    assertResultsWritten();
  } catch (error) {
    const code = reportError(error);
    // The thread that is stuck would keep the process alive.
    if (error instanceof MemtablesError && error.code === 'HYPERVISOR_STUCK') exitNow(code);
    // Not process.exit at once: what was printed so far has to reach a pipe.
    process.exitCode = code;
  }
}

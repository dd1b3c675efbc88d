import { exitNow } from './exit-now.js';
import { stdoutBroken } from './output.js';

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/**
 * Aborted when the user wants the command to end: by Ctrl-C, a signal, or because nobody reads its results any more.
 * A second signal ends the process at once, with this code and message.
 */
export function stopRequest(atOnce: { readonly code: number; readonly message: string }): AbortSignal {
  const signalled = new AbortController();
  for (const name of SIGNALS) {
    process.on(name, () => {
      if (signalled.signal.aborted) {
        process.stderr.write(`memtables: ${atOnce.message}\n`);
        exitNow(atOnce.code);
      }
      signalled.abort(new Error(`interrupted by ${name}`));
    });
  }
  return AbortSignal.any([signalled.signal, stdoutBroken]);
}

import koffi from 'koffi';

/**
 * Ends the process at once and without any clean-up. `process.exit` waits for every other thread, and a thread
 * inside a native call of libvmi may not come back for a long time, or ever.
 */
export function exitNow(code: number): never {
  koffi.load(null).func('_exit', 'void', ['int'])(code);
  throw new Error('_exit has returned');
}

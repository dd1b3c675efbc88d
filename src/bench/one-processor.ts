import koffi from 'koffi';
import { MemtablesError } from '../errors.js';

/** Of glibc's `cpu_set_t`, in bytes. */
const CPU_SET_SIZE = 128;
const THIS_THREAD = 0;

/**
 * Keeps this thread, and the threads and processes that it starts from now on, on the processor it is on.
 *
 * @throws MemtablesError `BENCH_FAILED` when the system does not let it
 */
export function stayOnOneProcessor(): void {
  const libc = koffi.load(null);
  const processor: number = libc.func('sched_getcpu', 'int', [])();
  const set = Buffer.alloc(CPU_SET_SIZE);
  set[processor >> 3] = 1 << (processor & 7);
  const status = libc.func('sched_setaffinity', 'int', ['int', 'size_t', 'void *'])(
    THIS_THREAD,
    set.length,
    set,
  );
  if (status === 0) return;
  throw new MemtablesError('BENCH_FAILED', 'the benchmark could not be kept on one processor', {
    remedy: 'Allow sched_setaffinity, which a sandbox may forbid.',
    context: { processor },
  });
}

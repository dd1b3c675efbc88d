import { EventEmitter } from 'node:events';
import { beforeEach, describe, expect, test, vi } from 'vitest';
import { Attachment } from '../../src/attachment/attachment.js';
import type { WorkerMessage } from '../../src/attachment/protocol.js';

/** A worker that does only what the test says. */
const worker = vi.hoisted(() => ({ current: undefined as unknown as EventEmitter }));
vi.mock('node:worker_threads', () => ({
  Worker: class {
    constructor() {
      // biome-ignore lint/correctness/noConstructorReturn: the test has to get hold of it
      return worker.current;
    }
  },
}));

const KERNEL = {
  base: 0xfffff80000000000n,
  size: 0x1000,
  pdb: 'x.pdb',
  modules: 0,
  vcpus: 1,
  library: 'x.so',
};
const failure = (action: Promise<unknown>): Promise<unknown> =>
  action.then(
    () => 'nothing was thrown',
    (error: unknown) => error,
  );

describe('a worker that dies', () => {
  const posts = (message: WorkerMessage) => worker.current.emit('message', message);
  const open = () => Attachment.open({ name: 'x', socket: '/tmp/x', profile: 'x.json' });

  beforeEach(() => {
    worker.current = Object.assign(new EventEmitter(), { postMessage: () => {} });
  });

  async function attached(): Promise<Attachment> {
    const opening = open();
    posts({ type: 'attached', kernel: KERNEL });
    return await opening;
  }

  const left = { code: 'ROLLBACK_FAILED', context: { journal: '/tmp/x.journal' } };

  test('by an error, while attached: nothing has been undone, and every question is answered by that', async () => {
    const attachment = await attached();
    const asked = [failure(attachment.hook('nt!A')), failure(attachment.statistics())];
    const cause = new Error('out of memory');
    worker.current.emit('error', cause);
    for (const error of await Promise.all(asked)) expect(error).toMatchObject({ ...left, cause });
    expect(await failure(attachment.ended)).toMatchObject(left);
    expect(await failure(attachment.unload())).toMatchObject(left);
  });

  test('without a word, while attached', async () => {
    const attachment = await attached();
    const asked = failure(attachment.unload());
    worker.current.emit('exit', 1);
    expect(await asked).toMatchObject(left);
  });

  test('by an error before it has attached: that error, for nothing was changed', async () => {
    const opening = failure(open());
    const error = new Error('no such module');
    worker.current.emit('error', error);
    expect(await opening).toBe(error);
  });

  test('after it has unloaded is no error', async () => {
    const attachment = await attached();
    const report = {
      scans: 1,
      blocked: 0,
      inHandlerAtScan: 0,
      evacuated: { vcpus: 0, threads: 0 },
      seconds: 0,
    };
    const unloading = attachment.unload();
    posts({ type: 'answer', id: 1, value: report });
    posts({ type: 'ended' });
    worker.current.emit('exit', 0);
    expect(await unloading).toEqual(report);
    await attachment.ended;
  });
});

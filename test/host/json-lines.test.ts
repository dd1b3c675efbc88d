import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { serveJsonLines } from '../../src/host/json-lines.js';

let directory: string;
let path: string;
let stop: () => Promise<void>;

const answers = {
  one: () => ({ value: 1 }),
  bad: () => {
    throw new Error('broken');
  },
};

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), 'memtables-host-'));
  path = join(directory, 'stats');
  stop = await serveJsonLines(path, answers);
});
afterEach(async () => {
  await stop();
  rmSync(directory, { recursive: true, force: true });
});

/** Sends `text` and returns what comes back until `lines` lines have, or the server hangs up. */
function ask(text: string, lines: number): Promise<unknown[]> {
  return new Promise((resolve) => {
    const socket = connect(path);
    let got = '';
    const done = () => {
      socket.destroy();
      resolve(
        got
          .split('\n')
          .filter(Boolean)
          .map((line) => JSON.parse(line)),
      );
    };
    socket.on('data', (data) => {
      got += data;
      if (got.split('\n').length > lines) done();
    });
    socket.on('close', done);
    socket.on('error', () => {});
    socket.write(text);
  });
}

describe('a JSON lines socket', () => {
  it('answers each line, in order, however the lines arrive', async () => {
    expect(await ask('{"cmd":"one"}\n{"cmd":"one"}\n', 2)).toEqual([{ value: 1 }, { value: 1 }]);
  });

  it.each([
    ['not JSON', 'hello\n'],
    ['no object', '7\n'],
    ['null', 'null\n'],
    ['an unknown request', '{"cmd":"stop"}\n'],
    ['a name every object has', '{"cmd":"toString"}\n'],
    ['a request that fails', '{"cmd":"bad"}\n'],
  ])('%s is an error, and the socket stays', async (_name, text) => {
    const [first, second] = await ask(`${text}{"cmd":"one"}\n`, 2);
    expect(first).toHaveProperty('error');
    expect(second).toEqual({ value: 1 });
  });

  it('a line without end is cut off', async () => {
    expect(await ask('x'.repeat(100_000), 1)).toEqual([]);
  });

  it('a socket left by a dead process is replaced', async () => {
    const left = join(directory, 'left');
    const listens = `require('node:net').createServer().listen(${JSON.stringify(left)}, () => process.kill(process.pid, 9))`;
    spawnSync(process.execPath, ['-e', listens]);
    expect(statSync(left).isSocket()).toBe(true);
    const again = await serveJsonLines(left, answers);
    await again();
  });

  it('that of a process that is alive is not, nor is a file', async () => {
    await expect(serveJsonLines(path, answers)).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: `another process listens on ${path}`,
    });
    expect(await ask('{"cmd":"one"}\n', 1)).toEqual([{ value: 1 }]);
    const file = join(directory, 'file');
    writeFileSync(file, 'mine');
    await expect(serveJsonLines(file, answers)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    expect(readFileSync(file, 'utf8')).toBe('mine');
  });

  it('a directory that is not there is said', async () => {
    await expect(serveJsonLines(join(directory, 'missing', 'stats'), answers)).rejects.toMatchObject({
      message: expect.stringContaining(`lies in ${join(directory, 'missing')}, which is not a directory`),
    });
  });
});

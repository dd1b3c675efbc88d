// A unix socket that answers JSON lines: one request a line, one answer a line, in order.
import { chmodSync, rmSync } from 'node:fs';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { MemtablesError } from '../errors.js';
import { isSocketAt } from '../socket-place.js';

/** A request is a few words; a longer line is no request of ours. */
const MAX_LINE = 4096;
const OWNER_ONLY = 0o600;

/** What a request with this `cmd` is answered with. */
export type Answers = Readonly<Record<string, () => object>>;

/**
 * Listens on `path`; a socket left there by an earlier process is replaced.
 *
 * @returns how to stop: closes the clients too, and removes the socket
 * @throws MemtablesError `INVALID_ARGUMENT` when the path cannot be listened on
 */
export async function serveJsonLines(path: string, answers: Answers): Promise<() => Promise<void>> {
  const clients = new Set<Socket>();
  const server = createServer((socket) => {
    clients.add(socket);
    socket.on('close', () => clients.delete(socket));
    socket.on('error', () => socket.destroy());
    answerLines(socket, answers);
  });
  if (isSocketAt(path) && (await isListenedOn(path))) {
    throw new MemtablesError('INVALID_ARGUMENT', `another process listens on ${path}`, {
      remedy: 'End it, if it is an earlier host, or name another path.',
      context: { path },
    });
  }
  try {
    rmSync(path, { force: true });
    await listen(server, path);
  } catch (cause) {
    throw new MemtablesError('INVALID_ARGUMENT', `cannot listen on ${path}`, {
      remedy: 'Name a path in a directory you may write to.',
      context: { path },
      cause,
    });
  }
  chmodSync(path, OWNER_ONLY);
  return () =>
    new Promise((resolve) => {
      for (const client of clients) client.destroy();
      server.close(() => resolve());
    });
}

function listen(server: Server, path: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen(path, () => {
      server.off('error', reject);
      resolve();
    });
  });
}

function answerLines(socket: Socket, answers: Answers): void {
  let pending = '';
  socket.setEncoding('utf8');
  socket.on('data', (text: string) => {
    const lines = (pending + text).split('\n');
    pending = lines.pop()!;
    for (const line of lines) socket.write(`${JSON.stringify(answerTo(line, answers))}\n`);
    if (pending.length > MAX_LINE) socket.destroy();
  });
}

function answerTo(line: string, answers: Answers): object {
  try {
    const request: unknown = JSON.parse(line);
    const cmd = request && typeof request === 'object' && 'cmd' in request ? String(request.cmd) : '';
    const answer = Object.hasOwn(answers, cmd) ? answers[cmd] : undefined;
    if (answer) return answer();
    return { error: 'INVALID_ARGUMENT', message: `known requests: ${Object.keys(answers).join(', ')}` };
  } catch (error) {
    const code = error instanceof MemtablesError ? error.code : 'INVALID_ARGUMENT';
    return { error: code, message: error instanceof Error ? error.message : String(error) };
  }
}

/** Whether a process listens on the socket, as far as can be told: one that cannot be asked counts as one. */
function isListenedOn(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = connect(path);
    const answer = (listening: boolean) => {
      probe.destroy();
      resolve(listening);
    };
    probe.once('connect', () => answer(true));
    probe.once('error', ({ code }: NodeJS.ErrnoException) =>
      answer(code !== 'ECONNREFUSED' && code !== 'ENOENT'),
    );
  });
}

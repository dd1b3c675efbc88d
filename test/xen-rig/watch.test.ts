import { appendFileSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { toPortable } from '../../src/attachment/protocol.js';
import { MemtablesError } from '../../src/errors.js';
import type { Dom0Line } from '../../src/xen-rig/report.js';
import { watch } from '../../src/xen-rig/watch.js';

const NEVER = new Promise<string>(() => {});
const LONG = 60;

let folder: string;
let files: { console: string; results: string };
let seen: string[];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'memtables-rig-'));
  files = { console: join(folder, 'console.log'), results: join(folder, 'results.jsonl') };
  for (const file of Object.values(files)) writeFileSync(file, '');
  seen = [];
});

afterEach(() => rmSync(folder, { recursive: true }));

function dom0Reports(...lines: readonly Dom0Line[]): void {
  for (const line of lines) appendFileSync(files.results, `${JSON.stringify(line)}\r\n`);
}

function watched(ended: Promise<string> = NEVER, limitSeconds = LONG, signal = new AbortController().signal) {
  const watcher = {
    stage: (text: string) => seen.push(text),
    result: (record: object) => seen.push(JSON.stringify(record)),
  };
  return watch({ ended }, files, limitSeconds, watcher, signal);
}

const JUDGED: Dom0Line = { type: 'judged', shortcomings: [] };

test('what dom0 reports is passed on line by line, up to its judgement', async () => {
  appendFileSync(files.console, '(XEN) Xen version 4.17.7 (Debian)\r\n### init\r\n');
  dom0Reports({ type: 'stage', text: 'domain created' }, { type: 'result', record: { type: 'phase' } });
  dom0Reports({ type: 'judged', shortcomings: ['it is slow'] });
  expect(await watched()).toEqual({
    facts: { hypervisor: 'xen-4.17.7', ept: false },
    shortcomings: ['it is slow'],
  });
  expect(seen).toEqual(['Xen starts', 'dom0 has booted', 'domain created', '{"type":"phase"}']);
});

test('a line that has come in two pieces is one line', async () => {
  const text = `${JSON.stringify(JUDGED)}\n`;
  appendFileSync(files.results, text.slice(0, 10));
  const watching = watched();
  // It looks at the file while it waits for the rest.
  await new Promise((resolve) => setTimeout(resolve, 300));
  appendFileSync(files.results, text.slice(10));
  expect((await watching).shortcomings).toEqual([]);
});

test('a damaged line is left out', async () => {
  appendFileSync(files.results, '{"type":"result","rec\n');
  dom0Reports(JUDGED);
  await watched();
  expect(seen).toEqual([]);
});

describe('a run that fails', () => {
  test('by a machine that ends early: how, after which stage, and where the logs are', async () => {
    appendFileSync(files.console, '### init\n');
    await expect(watched(Promise.resolve('SIGSEGV'))).rejects.toMatchObject({
      code: 'RIG_FAILED',
      message: 'the machine ended (SIGSEGV) before dom0 had reported; the last stage was: dom0 has booted',
      context: files,
    });
  });

  test('is judged by what dom0 had reported by then, not by how the machine ended', async () => {
    dom0Reports(JUDGED);
    expect((await watched(Promise.resolve('exit code 1'))).shortcomings).toEqual([]);
  });

  test('by a machine that hangs: after the time limit, with the stage', async () => {
    appendFileSync(files.console, '### xenstored\n');
    await expect(watched(NEVER, 0.1)).rejects.toMatchObject({
      code: 'RIG_FAILED',
      message: 'the run was not through within 0.1 s; the last stage was: xenstored runs',
      context: files,
    });
  });

  test('by an error in dom0: that very error', async () => {
    const error = new MemtablesError('ATTACH_FAILED', 'no such VM', {
      remedy: 'Check the name.',
      context: { name: 'guest' },
    });
    dom0Reports({ type: 'error', error: toPortable(error) });
    await expect(watched()).rejects.toMatchObject({
      code: 'ATTACH_FAILED',
      message: 'no such VM',
      remedy: 'Check the name.',
      context: { name: 'guest' },
    });
  });

  test('by Ctrl-C: at once', async () => {
    const reason = new Error('interrupted');
    await expect(watched(NEVER, LONG, AbortSignal.abort(reason))).rejects.toThrow();
  });
});

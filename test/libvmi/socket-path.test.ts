import {
  existsSync,
  linkSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { MemtablesError } from '../../src/errors.js';
import { prepareSocketPath } from '../../src/libvmi/socket-path.js';

let directory: string;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'memtables-socket-'));
});

afterEach(() => rmSync(directory, { recursive: true }));

function codeOf(path: string): string {
  try {
    prepareSocketPath(path);
  } catch (error) {
    return (error as MemtablesError).code;
  }
  return 'accepted';
}

async function listenAt(path: string): Promise<() => Promise<void>> {
  const server = createServer();
  await new Promise<void>((listening) => server.listen(path, listening));
  return () => new Promise((closed) => server.close(() => closed()));
}

describe('the path of a socket', () => {
  test('that does not exist yet', () => {
    expect(codeOf(join(directory, 'kvmi.sock'))).toBe('accepted');
  });

  test.each(['1', '42/kvmi.sock', ' 7', '+7', '007/x', '\t9'])(
    '%j would be taken for a vsock port',
    (path) => {
      expect(codeOf(path)).toBe('INVALID_ARGUMENT');
    },
  );

  test.each(['0', 'x1', '-1', '0x10'])('%j would not', (path) => {
    expect(codeOf(path)).toBe('accepted');
  });

  test.each([
    ['empty', ''],
    ['with a zero', '/tmp/a\0b'],
    ['of 108 bytes, which would be cut off', `/tmp/${'x'.repeat(103)}`],
    ['of 108 bytes in fewer characters', `/tmp/${'ü'.repeat(51)}x`],
  ])('%s', (_name, path) => {
    expect(codeOf(path)).toBe('INVALID_ARGUMENT');
  });

  test('of 107 bytes', () => {
    expect(codeOf(`/tmp/${'x'.repeat(102)}`)).toBe('accepted');
  });

  test('in a directory that is not there, or is none', () => {
    writeFileSync(join(directory, 'file'), '');
    expect(codeOf(join(directory, 'absent', 'kvmi.sock'))).toBe('INVALID_ARGUMENT');
    expect(codeOf(join(directory, 'file', 'kvmi.sock'))).toBe('INVALID_ARGUMENT');
  });

  test('where something else lies, which libkvmi would delete', () => {
    const file = join(directory, 'precious');
    writeFileSync(file, 'data');
    mkdirSync(join(directory, 'folder'));
    symlinkSync(file, join(directory, 'link'));
    for (const name of ['precious', 'folder', 'link']) {
      expect(codeOf(join(directory, name))).toBe('INVALID_ARGUMENT');
    }
    expect(readFileSync(file, 'utf8')).toBe('data');
  });

  test('that an earlier run left behind is freed', async () => {
    const path = join(directory, 'kvmi.sock');
    const bound = join(directory, 'bound.sock');
    const close = await listenAt(bound);
    // Closing unlinks the path it was bound to; the other one is left over.
    linkSync(bound, path);
    await close();
    expect(existsSync(path)).toBe(true);
    expect(codeOf(path)).toBe('accepted');
    expect(existsSync(path)).toBe(false);
  });

  test.each(['absolute', 'relative'])('that another process listens on, %s', async (kind) => {
    const path = join(directory, 'kvmi.sock');
    const close = await listenAt(path);
    try {
      expect(codeOf(kind === 'absolute' ? path : relative(process.cwd(), path))).toBe('ATTACH_FAILED');
      expect(existsSync(path)).toBe(true);
    } finally {
      await close();
    }
  });
});

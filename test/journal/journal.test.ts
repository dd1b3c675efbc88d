import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Journal } from '../../src/journal/journal.js';

const IDENTITY = { guest: 'vm', kernelBase: 0xffff_f800_0020_0000n, pdb: 'ntkrnlmp.pdb' };
const CHANGE = { gpa: 0x1234n, before: Buffer.from('8bec', 'hex'), after: Buffer.from('e900', 'hex'), owner: 'x' };

let directory: string;
let path: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'journal-'));
  path = join(directory, 'journal');
});
afterEach(() => rmSync(directory, { recursive: true }));

const lines = () =>
  readFileSync(path, 'utf8')
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line));

describe('journal', () => {
  test('a change is in the file before record returns, with the bytes to put back', () => {
    const journal = Journal.create(path, IDENTITY);
    journal.record(CHANGE);
    expect(lines()).toEqual([
      { type: 'journal', version: 1, guest: 'vm', kernelBase: '0xfffff80000200000', pdb: 'ntkrnlmp.pdb' },
      { type: 'write', id: 1, owner: 'x', gpa: '0x1234', before: '8bec', after: 'e900' },
    ]);
  });

  test('the file stays after close while a change is still in the guest', () => {
    const journal = Journal.create(path, IDENTITY);
    const first = journal.record(CHANGE);
    journal.record({ ...CHANGE, gpa: 0x2000n });
    journal.undone(first);
    expect(journal.outstanding).toBe(1);
    journal.close();
    expect(lines().at(-1)).toEqual({ type: 'undone', id: first });
  });

  test('the file is gone once everything is undone', () => {
    const journal = Journal.create(path, IDENTITY);
    journal.undone(journal.record(CHANGE));
    journal.close();
    expect(existsSync(path)).toBe(false);
  });

  test('a journal left by an earlier run is never overwritten', () => {
    Journal.create(path, IDENTITY).record(CHANGE);
    const before = readFileSync(path);
    expect(() => Journal.create(path, IDENTITY)).toThrow(
      expect.objectContaining({ code: 'JOURNAL_FAILED', context: { path } }),
    );
    expect(readFileSync(path)).toEqual(before);
  });

  test('a place that cannot be written is a typed error', () => {
    expect(() => Journal.create(join(directory, 'missing', 'journal'), IDENTITY)).toThrow(
      expect.objectContaining({ code: 'JOURNAL_FAILED' }),
    );
  });
});

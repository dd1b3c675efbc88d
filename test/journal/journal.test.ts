import { appendFileSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Journal, type LeftChange } from '../../src/journal/journal.js';

const IDENTITY = { guest: 'vm', kernelBase: 0xffff_f800_0020_0000n, pdb: 'ntkrnlmp.pdb' };
const CHANGE = {
  gpa: 0x1234n,
  before: Buffer.from('8bec', 'hex'),
  after: Buffer.from('e900', 'hex'),
  owner: 'x',
};

let directory: string;
let path: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'journal-'));
  path = join(directory, 'journal');
});
afterEach(() => rmSync(directory, { recursive: true }));

const create = (at = path, isInGuest: (change: LeftChange) => boolean = () => true) =>
  Journal.create(at, IDENTITY, isInGuest);

const lines = () =>
  readFileSync(path, 'utf8')
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line));

describe('journal', () => {
  test('a change is in the file before record returns, with the bytes to put back', () => {
    const journal = create();
    journal.record(CHANGE);
    expect(lines()).toEqual([
      { type: 'journal', version: 1, guest: 'vm', kernelBase: '0xfffff80000200000', pdb: 'ntkrnlmp.pdb' },
      { type: 'write', id: 1, owner: 'x', gpa: '0x1234', before: '8bec', after: 'e900' },
    ]);
  });

  test('the file stays after close while a change is still in the guest', () => {
    const journal = create();
    const first = journal.record(CHANGE);
    journal.record({ ...CHANGE, gpa: 0x2000n });
    journal.undone(first);
    expect(journal.outstanding).toBe(1);
    journal.close();
    expect(lines().at(-1)).toEqual({ type: 'undone', id: first });
  });

  test('the file is gone once everything is undone', () => {
    const journal = create();
    journal.undone(journal.record(CHANGE));
    journal.close();
    expect(existsSync(path)).toBe(false);
  });

  test('a journal is never replaced while one of its changes is still in the guest', () => {
    const journal = create();
    journal.undone(journal.record(CHANGE));
    journal.record({ ...CHANGE, gpa: 0x2000n });
    const before = readFileSync(path);
    const asked: bigint[] = [];
    const again = () =>
      create(path, ({ gpa }) => {
        asked.push(gpa);
        return true;
      });
    expect(again).toThrow(expect.objectContaining({ code: 'JOURNAL_FAILED' }));
    expect(asked).toEqual([0x2000n]);
    expect(readFileSync(path)).toEqual(before);
  });

  test('a journal is replaced once its guest has been restarted', () => {
    create().record(CHANGE);
    create(path, () => false);
    expect(lines()).toHaveLength(1);
  });

  test('a line that was cut short by a crash was never a change', () => {
    create().record(CHANGE);
    appendFileSync(path, '{"type":"wri');
    expect(() => create(path, () => true)).toThrow(
      expect.objectContaining({ context: expect.objectContaining({ changes: 1 }) }),
    );
  });

  test('a file that is no journal is refused, not replaced', () => {
    writeFileSync(path, 'precious\n');
    expect(() => create()).toThrow(expect.objectContaining({ code: 'JOURNAL_FAILED' }));
    expect(readFileSync(path, 'utf8')).toBe('precious\n');
  });

  test('a place that cannot be written is a typed error', () => {
    expect(() => create(join(directory, 'missing', 'journal'))).toThrow(
      expect.objectContaining({ code: 'JOURNAL_FAILED' }),
    );
  });
});

import { appendFileSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { Journal, type LeftChange } from '../../src/journal/journal.js';

const disk = vi.hoisted(() => ({ full: false }));
vi.mock('node:fs', async (original) => {
  const fs = await original<typeof import('node:fs')>();
  const writeSync = (fd: number, text: string) => {
    if (disk.full) throw new Error('ENOSPC: no space left on device');
    return fs.writeSync(fd, text);
  };
  return { ...fs, writeSync };
});

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
afterEach(() => {
  rmSync(directory, { recursive: true });
  disk.full = false;
});

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

  test.each([
    'precious',
    'precious\n',
    '{"precious":true}\n',
    'null\n',
    '[1]\n',
    '\0\u0001',
    '{"type":"journal","version":2,"guest":"vm"}\n',
    '{"type":"journal","version":1,"guest":"vm"}\nprecious\n',
    '{"type":"journal","version":1,"guest":"vm"}\n{"type":"write","id":1,"gpa":"here","after":"00"}\n',
    '{"type":"journal","version":1,"guest":"vm"}\n{"type":"write","id":1,"gpa":"0x1","after":"0"}\n',
    '{"type":"journal","version":1,"guest":"vm"}\n{"type":"undone"}\n',
  ])('a file that is no journal is refused, not replaced: %j', (text) => {
    writeFileSync(path, text);
    const refused = { code: 'JOURNAL_FAILED', message: `${path} is not a journal of memtables` };
    expect(() => create(path, () => false)).toThrow(expect.objectContaining(refused));
    expect(readFileSync(path, 'utf8')).toBe(text);
  });

  test.each(['', '{"type":"jour', '{"type":"journal","version":1,"guest":"v'])(
    'a journal of a run that was killed as it began is replaced: %j',
    (text) => {
      writeFileSync(path, text);
      create();
      expect(lines()).toHaveLength(1);
    },
  );

  test('the journal of another guest is kept: its tool may be running', () => {
    const other = Journal.create(path, { ...IDENTITY, guest: 'other' }, () => false);
    other.record(CHANGE);
    const before = readFileSync(path);
    expect(() => create(path, () => false)).toThrow(`${path} is the journal of the guest other`);
    expect(readFileSync(path)).toEqual(before);
  });

  test('something that is no file is refused: a device may have no end', () => {
    expect(() => create('/dev/zero')).toThrow(expect.objectContaining({ code: 'JOURNAL_FAILED' }));
    expect(() => create(directory)).toThrow(expect.objectContaining({ code: 'JOURNAL_FAILED' }));
  });

  test('a disk that is full stops changes, and does not stop undoing them', () => {
    const journal = create();
    const id = journal.record(CHANGE);
    disk.full = true;
    expect(() => journal.record(CHANGE)).toThrow(expect.objectContaining({ code: 'JOURNAL_FAILED' }));
    expect(journal.outstanding).toBe(1);
    journal.undone(id);
    journal.close();
    expect(existsSync(path)).toBe(false);
  });

  test('a place that cannot be written is a typed error', () => {
    expect(() => create(join(directory, 'missing', 'journal'))).toThrow(
      expect.objectContaining({ code: 'JOURNAL_FAILED' }),
    );
  });
});

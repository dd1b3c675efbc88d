import { appendFileSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { Journal, type LeftChange } from '../../src/journal/journal.js';

/** A disk with so many free bytes: a write takes what fits, as the system's does, and fails where nothing does. */
const disk = vi.hoisted(() => ({ free: Number.POSITIVE_INFINITY, stuck: false }));
vi.mock('node:fs', async (original) => {
  const fs = await original<typeof import('node:fs')>();
  const writeSync = (fd: number, bytes: Buffer, offset: number, length: number, position: number) => {
    const size = Math.min(length, disk.free);
    if (size === 0) throw new Error('ENOSPC: no space left on device');
    disk.free -= size;
    return fs.writeSync(fd, bytes, offset, size, position);
  };
  const ftruncateSync = (fd: number, size: number) => {
    disk.free += fs.fstatSync(fd).size - size;
    fs.ftruncateSync(fd, size);
  };
  const rmSync: typeof fs.rmSync = (path, options) => {
    if (disk.stuck) throw new Error('EROFS: read-only file system');
    fs.rmSync(path, options);
  };
  return { ...fs, writeSync, ftruncateSync, rmSync };
});

const IDENTITY = { guest: 'vm', kernelBase: 0xffff_f800_0020_0000n, pdb: 'ntkrnlmp.pdb' };
const CHANGE = {
  gpa: 0x1234n,
  before: Buffer.from('8bec', 'hex'),
  after: Buffer.from('e900', 'hex'),
  owner: 'x',
};

const HEADER = '{"type":"journal","version":1,"guest":"vm","kernelBase":"0xfffff80000200000","pdb":"x"}';

let directory: string;
let path: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'journal-'));
  path = join(directory, 'journal');
});
afterEach(() => {
  disk.free = Number.POSITIVE_INFINITY;
  disk.stuck = false;
  rmSync(directory, { recursive: true });
});

const create = (at = path, isUndone: (change: LeftChange) => boolean = () => false) =>
  Journal.create(at, IDENTITY, isUndone);

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
    const asked: LeftChange[] = [];
    const again = () =>
      create(path, (change) => {
        asked.push(change);
        return false;
      });
    expect(again).toThrow(expect.objectContaining({ code: 'JOURNAL_FAILED' }));
    expect(asked).toEqual([expect.objectContaining({ gpa: 0x2000n, before: CHANGE.before })]);
    expect(readFileSync(path)).toEqual(before);
  });

  test('a journal is replaced once each of its changes has been undone', () => {
    create().record(CHANGE);
    create(path, () => true);
    expect(lines()).toHaveLength(1);
  });

  test.each([{ kernelBase: IDENTITY.kernelBase + 0x20_0000n }, { pdb: 'ntkrnlmp.pdb of another build' }])(
    'a journal is replaced once its guest has been restarted: %o',
    (change) => {
      create().record(CHANGE);
      Journal.create(path, { ...IDENTITY, ...change }, () => false);
      expect(lines()).toHaveLength(1);
    },
  );

  test('a line that was cut short by a crash was never a change', () => {
    create().record(CHANGE);
    appendFileSync(path, '{"type":"wri');
    expect(() => create()).toThrow(
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
    '{"type":"journal","version":1,"guest":"vm"}\n',
    '{"type":"journal","version":1,"guest":"vm","kernelBase":"here","pdb":"x"}\n',
    `${HEADER}\nprecious\n`,
    `${HEADER}\n{"type":"write","id":1,"gpa":"here","before":"00"}\n`,
    `${HEADER}\n{"type":"write","id":1,"gpa":"0x1","before":"0"}\n`,
    `${HEADER}\n{"type":"undone"}\n`,
  ])('a file that is no journal is refused, not replaced: %j', (text) => {
    writeFileSync(path, text);
    const refused = { code: 'JOURNAL_FAILED', message: `${path} is not a journal of memtables` };
    expect(() => create(path, () => true)).toThrow(expect.objectContaining(refused));
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
    const other = Journal.create(path, { ...IDENTITY, guest: 'other' }, () => true);
    other.record(CHANGE);
    const before = readFileSync(path);
    expect(() => create(path, () => true)).toThrow(`${path} is the journal of the guest other`);
    expect(readFileSync(path)).toEqual(before);
  });

  test('something that is no file is refused: a device may have no end', () => {
    expect(() => create('/dev/zero')).toThrow(expect.objectContaining({ code: 'JOURNAL_FAILED' }));
    expect(() => create(directory)).toThrow(expect.objectContaining({ code: 'JOURNAL_FAILED' }));
  });

  test.each([0, 1, 40])(
    'a disk with %i free bytes stops changes, keeps whole lines only, and does not stop undoing',
    (free) => {
      const journal = create();
      const id = journal.record(CHANGE);
      const before = readFileSync(path, 'utf8');
      disk.free = free;
      expect(() => journal.record({ ...CHANGE, gpa: 0x2000n })).toThrow(
        expect.objectContaining({ code: 'JOURNAL_FAILED', cause: expect.any(Error) }),
      );
      expect(readFileSync(path, 'utf8')).toBe(before);
      expect([journal.outstanding, disk.free]).toEqual([1, free]);
      disk.free = 1000;
      const third = journal.record({ ...CHANGE, gpa: 0x3000n });
      expect(lines().map(({ gpa }) => gpa)).toEqual([undefined, '0x1234', '0x3000']);
      disk.free = free;
      journal.undone(third);
      journal.undone(id);
      journal.close();
      expect(existsSync(path)).toBe(false);
    },
  );

  test('that cannot even begin leaves no file', () => {
    disk.free = 40;
    expect(() => create()).toThrow(expect.objectContaining({ code: 'JOURNAL_FAILED' }));
    expect(existsSync(path)).toBe(false);
  });

  test('that cannot be removed at the end is a typed error', () => {
    const journal = create();
    disk.stuck = true;
    expect(() => journal.close()).toThrow(
      expect.objectContaining({ code: 'JOURNAL_FAILED', context: { path }, cause: expect.any(Error) }),
    );
  });

  test('a place that cannot be written is a typed error', () => {
    expect(() => create(join(directory, 'missing', 'journal'))).toThrow(
      expect.objectContaining({ code: 'JOURNAL_FAILED' }),
    );
  });
});

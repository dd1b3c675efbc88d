import { chmodSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { cpioOf } from '../../src/xen-rig/cpio.js';

interface Entry {
  readonly mode: number;
  readonly content: string;
}

/** By the kernel's description of the format. */
function entriesOf(archive: Buffer): Map<string, Entry> {
  const entries = new Map<string, Entry>();
  for (let at = 0; at < archive.length; ) {
    expect(archive.toString('latin1', at, at + 6)).toBe('070701');
    const field = (index: number) =>
      Number.parseInt(archive.toString('latin1', at + 6 + index * 8, at + 14 + index * 8), 16);
    const [mode, owner, group, size, nameBytes] = [field(1), field(2), field(3), field(6), field(11)];
    expect([owner, group]).toEqual([0, 0]);
    const name = archive.toString('latin1', at + 110, at + 110 + nameBytes - 1);
    const content = at + ((110 + nameBytes + 3) & ~3);
    entries.set(name, { mode, content: archive.toString('latin1', content, content + size) });
    at = content + ((size + 3) & ~3);
  }
  return entries;
}

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'memtables-cpio-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

test('files, programs, links and folders, each folder before what is in it', () => {
  mkdirSync(join(folder, 'bin'));
  writeFileSync(join(folder, 'bin/tool'), 'code');
  chmodSync(join(folder, 'bin/tool'), 0o755);
  symlinkSync('tool', join(folder, 'bin/alias'));
  writeFileSync(join(folder, 'odd'), 'seven!!');
  const entries = entriesOf(cpioOf(folder));
  expect([...entries]).toEqual([
    ['bin', { mode: 0o040755, content: '' }],
    ['bin/alias', { mode: 0o120777, content: 'tool' }],
    ['bin/tool', { mode: 0o100755, content: 'code' }],
    ['odd', { mode: 0o100644, content: 'seven!!' }],
    ['TRAILER!!!', { mode: 0, content: '' }],
  ]);
});

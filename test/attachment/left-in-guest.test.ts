import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { withJournal } from '../../src/attachment/with-journal.js';
import { MemtablesError } from '../../src/errors.js';
import { Journal } from '../../src/journal/journal.js';
import { Host, PROFILE } from '../cli/command.js';
import { LIBRARIES } from '../libvmi/libraries.js';

// The built one: its worker is a file of its own.
const { Attachment } = (await import(
  new URL('../../dist/index.js', import.meta.url).href
)) as typeof import('../../src/index.js');

const HOOK = 'nt!NtQuerySystemInformation';

const failure = (action: Promise<unknown>): Promise<MemtablesError> =>
  action.then(
    () => {
      throw new Error('nothing was thrown');
    },
    (error: MemtablesError) => error,
  );

describe.each(LIBRARIES)('a hypervisor that is lost with hooks in the guest, over $library,', ({ path }) => {
  let host: Host;
  let attachment: Awaited<ReturnType<typeof Attachment.open>>;

  beforeEach(async () => {
    host = await Host.start();
    attachment = await Attachment.open({
      name: 'embedded',
      socket: host.socket,
      profile: PROFILE,
      library: path,
      stuckAfterSeconds: 2,
    });
    await attachment.hook(HOOK);
    while ((await attachment.statistics()).relocations === 0) {}
  });
  afterEach(() => host.stop());

  /** What the journal's file says is in the guest, read by other means. */
  function inJournal() {
    const lines = readFileSync(host.journal, 'utf8').trimEnd().split('\n');
    const entries = lines.map((line) => JSON.parse(line));
    const undone = new Set(entries.filter(({ type }) => type === 'undone').map(({ id }) => id));
    return entries
      .filter(({ type, id }) => type === 'write' && !undone.has(id))
      .map(({ gpa, before, owner }) => ({ gpa: BigInt(gpa), length: before.length / 2, before, owner }));
  }

  function expectToTell(error: MemtablesError): void {
    const left = inJournal();
    // A hook and a relocation take two writes each.
    expect(left.length).toBeGreaterThanOrEqual(4);
    expect(error.context).toMatchObject({ journal: host.journal, inGuest: left });
    expect(left.map(({ owner }) => owner)).toContain(`code of ${HOOK}`);
    expect(error.message).toContain(
      `; ${left.length} changes are still in the guest; ${host.journal} lists them`,
    );
    expect(error.remedy).toContain('put the bytes back');
  }

  test('because it stops answering: the error names the call and what is left, and the guest is let go', async () => {
    host.command.kill('SIGSTOP');
    const unloading = failure(attachment.unload());
    const error = await failure(attachment.ended);
    expect(error.code).toBe('HYPERVISOR_STUCK');
    expect(error.message).toMatch(/^vmi_\w+ has not returned for \d+ ms; /);
    expectToTell(error);
    expect(await unloading).toBe(error);
    host.command.kill('SIGCONT');
    await host.expectReleased();
  });

  test('because it is killed: the error tells what is left', async () => {
    host.command.kill('SIGKILL');
    const error = await failure(attachment.ended);
    expect(error.code).toBe('HYPERVISOR_GONE');
    expectToTell(error);
  });
});

describe('an error that ends an attachment', () => {
  const CHANGE = { gpa: 0x1234n, before: Buffer.of(0x8b, 0xec), after: Buffer.of(0xe9, 0), owner: 'x' };
  const gone = new MemtablesError('HYPERVISOR_GONE', 'gone', {
    remedy: 'Attach again.',
    context: { at: 1n },
    cause: new Error('first'),
  });
  let path: string;
  let journal: Journal;

  beforeEach(() => {
    path = join(mkdtempSync(join(tmpdir(), 'memtables-left-')), 'journal');
    journal = Journal.create(path, { guest: 'vm', kernelBase: 1n, pdb: 'x' }, () => true);
  });
  afterEach(() => rmSync(join(path, '..'), { recursive: true }));

  test('counts what has not been undone, and keeps what it said before', () => {
    journal.undone(journal.record(CHANGE));
    journal.record({ ...CHANGE, gpa: 0x2000n });
    expect(withJournal(gone, path)).toMatchObject({
      code: 'HYPERVISOR_GONE',
      message: `gone; 1 change is still in the guest; ${path} lists it`,
      context: {
        at: 1n,
        journal: path,
        inGuest: [{ gpa: 0x2000n, length: 2, before: '8bec', owner: 'x' }],
      },
      cause: gone.cause,
    });
  });

  test('stays as it is where nothing is left, also where there is no journal', () => {
    expect(withJournal(gone, path)).toBe(gone);
    expect(withJournal(gone, `${path}.absent`)).toBe(gone);
  });

  test('is not lost because the journal cannot be read: it says that instead', () => {
    writeFileSync(path, 'something else');
    const error = withJournal(gone, path) as MemtablesError;
    expect(error).toMatchObject({ code: 'HYPERVISOR_GONE', context: { at: 1n, journal: path } });
    expect(error.message).toBe(
      `gone; changes may be in the guest, and ${path} is not a journal of memtables`,
    );
  });
});

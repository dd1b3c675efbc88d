import { execFile } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { Host, PROFILE } from '../cli/command.js';

const LIBRARY = new URL('../../dist/index.js', import.meta.url).href;
// The built one: its worker is a file of its own.
const { Attachment, MemtablesError } = (await import(LIBRARY)) as typeof import('../../src/index.js');

let host: Host;
beforeAll(async () => {
  host = await Host.start({ vcpus: 1 });
});
afterEach(() => host.expectAsFound());
afterAll(() => host.stop());

const open = () => Attachment.open({ name: 'embedded', socket: host.socket, profile: PROFILE });
const failure = (action: Promise<unknown>): Promise<unknown> =>
  action.then(
    () => 'nothing was thrown',
    (error: unknown) => error,
  );

describe('an attachment', () => {
  test('goes on after a hook was refused, with the whole error from the other thread', async () => {
    const attachment = await open();
    const error = await failure(attachment.hook('nt!NtQueryEaFile'));
    expect(error).toBeInstanceOf(MemtablesError);
    expect(error).toMatchObject({
      code: 'HOOK_REFUSED',
      remedy: expect.stringContaining('PAGE'),
      context: { function: 'nt!NtQueryEaFile', reason: 'pageable' },
      stack: expect.stringContaining('hooks.js'),
    });
    for (const [name, code] of [
      ['nt!NoSuchFunction', 'SYMBOL_NOT_FOUND'],
      ['NtCreateFile', 'INVALID_ARGUMENT'],
      ['', 'INVALID_ARGUMENT'],
    ] as const) {
      expect(await failure(attachment.hook(name))).toMatchObject({ code });
    }
    await attachment.hook('nt!NtCreateFile');
    expect(await failure(attachment.hook('nt!NtCreateFile'))).toMatchObject({
      context: { reason: 'hooked-already' },
    });
    expect(await attachment.statistics()).toMatchObject({ hooks: 1 });
    await attachment.unload();
  });

  test('unloads once, however often it is asked to, and answers nothing afterwards', async () => {
    const attachment = await open();
    await attachment.hook('nt!NtCreateFile');
    const [first, second, late] = await Promise.allSettled([
      attachment.unload(),
      attachment.unload(),
      attachment.statistics(),
    ]);
    expect(first).toMatchObject({ status: 'fulfilled', value: { scans: expect.any(Number) } });
    expect(second).toEqual(first);
    const unloaded = { code: 'NOT_ATTACHED', message: 'memtables has been unloaded from this guest' };
    expect(late).toMatchObject({ status: 'rejected', reason: unloaded });
    expect(await attachment.unload()).toEqual(first.status === 'fulfilled' && first.value);
    expect(await failure(attachment.hook('nt!NtCreateFile'))).toMatchObject(unloaded);
    expect(await failure(attachment.setRelocation(true))).toMatchObject(unloaded);
    await attachment.ended;
  });

  test('relocates what is hot before it says that relocation is on', async () => {
    const attachment = await Attachment.open({
      name: 'embedded',
      socket: host.socket,
      profile: PROFILE,
      relocate: false,
      threshold: 1,
    });
    const relocated: unknown[] = [];
    attachment.on('event', (event) => {
      if (event.type === 'relocated') relocated.push(event.site);
    });
    await attachment.hook('nt!NtQuerySystemInformation');
    while ((await attachment.statistics()).tableLoads < 100) {}
    expect(relocated).toEqual([]);
    await attachment.setRelocation(true);
    const atOnce = relocated.length;
    await attachment.unload();
    // All of them, however many the engine does in one step.
    expect(atOnce).toBeGreaterThan(1);
  });

  test('carries an error’s cause across threads', async () => {
    const profile = join(host.directory, 'broken.json');
    writeFileSync(profile, '{');
    const error = await failure(Attachment.open({ name: 'embedded', socket: host.socket, profile }));
    expect(error).toMatchObject({ code: 'PROFILE_INVALID', cause: expect.any(Error) });
    expect((error as { cause: Error }).cause.message).toContain('JSON');
  });

  test('is given up while nobody has connected: by the reason of the signal', async () => {
    const stop = new AbortController();
    const socket = join(host.directory, 'nobody');
    const opening = failure(Attachment.open({ name: 'x', socket, profile: PROFILE, signal: stop.signal }));
    const reason = new Error('enough');
    stop.abort(reason);
    expect(await opening).toBe(reason);
    const again = Attachment.open({ name: 'x', socket, profile: PROFILE, signal: stop.signal });
    expect(await failure(again)).toBe(reason);
  });

  test('keeps no process alive once it is unloaded, nor once it has failed', async () => {
    const program = `
      import { Attachment } from ${JSON.stringify(LIBRARY)};
      const options = ${JSON.stringify({ name: 'embedded', socket: host.socket, profile: PROFILE })};
      await Attachment.open({ ...options, profile: '/nowhere.json' }).catch((error) => console.log(error.code));
      const attachment = await Attachment.open(options);
      await attachment.hook('nt!NtCreateFile');
      await attachment.unload();
      console.log('unloaded');
    `;
    const { stdout } = await promisify(execFile)(process.execPath, ['--input-type=module', '-e', program]);
    expect(stdout).toBe('FILE_UNREADABLE\nunloaded\n');
  });
});

describe('an attachment that ends by an error of its own', () => {
  test('has unloaded by then, and answers with that error from then on', async () => {
    const attachment = await open();
    await attachment.hook('nt!NtCreateFile');
    const noText = { toString: 1, valueOf: 1 } as unknown as string;
    const error = await failure(attachment.hook(noText));
    expect(error).toBeInstanceOf(Error);
    expect(error).not.toBeInstanceOf(MemtablesError);
    const { message } = error as Error;
    expect(await failure(attachment.ended)).toMatchObject({ message });
    expect(await failure(attachment.statistics())).toMatchObject({ message });
    expect(await failure(attachment.unload())).toMatchObject({ message });
  });
});

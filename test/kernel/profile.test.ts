import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { loadProfile, parseProfile } from '../../src/nt/profile.js';
import { profileText } from './fake-guest.js';

const coded = (code: string) => expect.objectContaining({ name: 'MemtablesError', code });

describe('a profile', () => {
  it('gives RVAs and offsets', () => {
    const profile = parseProfile(profileText(), 'test');
    expect(profile.symbol('KiServiceTable')).toBe(0x1800);
    expect(profile.offset('_KTHREAD', 'KernelStack')).toBe(0x58);
    expect(profile.pdb).toEqual({
      name: 'ntkrnlmp.pdb',
      guid: '0123456789ABCDEF0123456789ABCDEF',
      age: 1,
    });
  });

  it('takes a GUID in any spelling', () => {
    const text = profileText((isf) => {
      isf.metadata.windows.pdb.GUID = '{01234567-89ab-cdef-0123-456789abcdef}';
    });
    expect(parseProfile(text, 'test').pdb.guid).toBe('0123456789ABCDEF0123456789ABCDEF');
  });

  it('says which symbol or field it lacks', () => {
    const profile = parseProfile(profileText(), 'test');
    expect(() => profile.symbol('NoSuchThing')).toThrow(coded('SYMBOL_NOT_FOUND'));
    expect(() => profile.offset('_KTHREAD', 'NoSuchField')).toThrow(coded('SYMBOL_NOT_FOUND'));
    expect(() => profile.offset('_NOSUCHTYPE', 'Field')).toThrow(/_NOSUCHTYPE\.Field/);
  });

  it('does not take what every JavaScript object inherits for a symbol', () => {
    const profile = parseProfile(profileText(), 'test');
    expect(profile.hasSymbol('constructor')).toBe(false);
    expect(profile.hasField('toString', 'name')).toBe(false);
    expect(() => profile.symbol('__proto__')).toThrow(coded('SYMBOL_NOT_FOUND'));
  });

  it.each([-1, 1.5, 2 ** 32, Number.NaN])('refuses the RVA %s', (address) => {
    const text = profileText((isf) => {
      isf.symbols.KiServiceTable = { address };
    });
    expect(() => parseProfile(text, 'test').symbol('KiServiceTable')).toThrow(coded('PROFILE_INVALID'));
  });

  it.each([-1, 0.5, 2 ** 30])('refuses the offset %s', (offset) => {
    const text = profileText((isf) => {
      isf.user_types._KTHREAD!.fields.State = { offset };
    });
    expect(() => parseProfile(text, 'test').offset('_KTHREAD', 'State')).toThrow(coded('PROFILE_INVALID'));
  });

  it.each([
    ['no JSON', 'MZ'],
    ['JSON of another kind', '[1, 2]'],
    ['null', 'null'],
    ['a Linux profile', '{"metadata":{"linux":{}},"symbols":{},"user_types":{}}'],
    ['no types', '{"metadata":{},"symbols":{}}'],
  ])('refuses %s', (_, text) => {
    expect(() => parseProfile(text, 'test')).toThrow(coded('PROFILE_INVALID'));
  });
});

describe('a profile file', () => {
  let directory: string;
  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), 'profile-'));
  });
  afterAll(() => rmSync(directory, { recursive: true }));
  const file = (name: string, content: string | Buffer): string => {
    const path = join(directory, name);
    writeFileSync(path, content);
    return path;
  };

  it('is read, compressed with gzip too', () => {
    expect(loadProfile(file('nt.json', profileText())).symbol('NtClose')).toBe(0x1100);
    expect(loadProfile(file('nt.json.gz', gzipSync(profileText()))).symbol('NtClose')).toBe(0x1100);
  });

  it('is refused when it is compressed with xz, with the command that unpacks it', () => {
    const path = file('nt.json.xz', Buffer.from('fd377a585a000004', 'hex'));
    expect(() => loadProfile(path)).toThrow(
      expect.objectContaining({
        code: 'PROFILE_INVALID',
        remedy: expect.stringContaining('xz --decompress'),
      }),
    );
  });

  it('is refused when it is not there, is a directory, or is cut off', () => {
    expect(() => loadProfile(join(directory, 'missing.json'))).toThrow(coded('FILE_UNREADABLE'));
    expect(() => loadProfile(directory)).toThrow(coded('FILE_UNREADABLE'));
    const whole = gzipSync(profileText());
    expect(() => loadProfile(file('cut.json.gz', whole.subarray(0, whole.length - 9)))).toThrow(
      coded('PROFILE_INVALID'),
    );
    expect(() => loadProfile(file('cut.json', profileText().slice(0, 99)))).toThrow(coded('PROFILE_INVALID'));
  });

  it('is refused before it is read when it is absurdly large', () => {
    const path = file('huge.json', '');
    truncateSync(path, 2 ** 30);
    expect(() => loadProfile(path)).toThrow(coded('PROFILE_INVALID'));
  });
});

import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import type { MemtablesError } from '../../src/errors.js';
import { FUNCTION_NAMES } from '../../src/libvmi/abi.js';
import { LIBRARY_VARIABLE, loadLibvmi } from '../../src/libvmi/library.js';
import { LIBRARIES } from './libraries.js';

let directory: string;
const variable = process.env[LIBRARY_VARIABLE];

beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), 'memtables-library-'));
});

afterEach(() => {
  if (variable === undefined) delete process.env[LIBRARY_VARIABLE];
  else process.env[LIBRARY_VARIABLE] = variable;
});

afterAll(() => rmSync(directory, { recursive: true }));

function errorOf(action: () => unknown): MemtablesError {
  try {
    action();
  } catch (error) {
    return error as MemtablesError;
  }
  throw new Error('nothing was thrown');
}

/** Compiles a library that has the functions `names`, of which none works. */
function stub(file: string, eventsVersion: number, names: readonly string[]): string {
  const path = join(directory, file);
  const source = names.map((name) => `unsigned ${name}(void) { return ${eventsVersion}; }`).join('\n');
  execFileSync('cc', ['-shared', '-fPIC', '-x', 'c', '-', '-o', path], { input: source });
  return path;
}

describe('loading a library', () => {
  test('that has another event layout is refused before any call that could crash', () => {
    const path = stub('version8.so', 8, FUNCTION_NAMES);
    const error = errorOf(() => loadLibvmi(path));
    expect([error.code, error.context.version]).toEqual(['LIBRARY_INCOMPATIBLE', 8]);
  });

  test('that has another event layout and lacks functions tells its version first', () => {
    const path = stub('version8-old.so', 8, ['vmi_events_version']);
    expect(errorOf(() => loadLibvmi(path)).context.version).toBe(8);
  });

  test('that lacks functions names each of them', () => {
    const present = FUNCTION_NAMES.filter((name) => name !== 'vmi_set_mem_event' && name !== 'vmi_init');
    const error = errorOf(() => loadLibvmi(stub('incomplete.so', 9, present)));
    expect(error.code).toBe('LIBRARY_INCOMPATIBLE');
    expect(error.context.missing).toEqual(['vmi_init', 'vmi_set_mem_event']);
  });

  test('that is something else altogether', () => {
    expect(errorOf(() => loadLibvmi(stub('other.so', 9, ['something_else']))).code).toBe(
      'LIBRARY_INCOMPATIBLE',
    );
  });

  test('that is no library', () => {
    const path = join(directory, 'text.so');
    writeFileSync(path, 'not an ELF file');
    const error = errorOf(() => loadLibvmi(path));
    expect(error.code).toBe('LIBRARY_NOT_LOADED');
    expect(error.message).toContain(path);
  });

  test('that is not there', () => {
    expect(errorOf(() => loadLibvmi(join(directory, 'absent.so'))).code).toBe('LIBRARY_NOT_LOADED');
  });

  test('takes the environment’s, unless another is asked for', () => {
    process.env[LIBRARY_VARIABLE] = join(directory, 'from-the-environment.so');
    expect(errorOf(() => loadLibvmi(undefined)).context.path).toBe(process.env[LIBRARY_VARIABLE]);
    expect(errorOf(() => loadLibvmi('/asked/for.so')).context.path).toBe('/asked/for.so');
  });

  test.each(LIBRARIES)('$library is complete', ({ path }) => {
    expect(Object.keys(loadLibvmi(path).functions)).toEqual(FUNCTION_NAMES);
  });
});

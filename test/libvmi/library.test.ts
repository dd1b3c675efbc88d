import { execFileSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { MemtablesError } from '../../src/errors.js';
import { FUNCTION_NAMES } from '../../src/libvmi/abi.js';
import { type Candidate, LIBRARY_VARIABLE, loadLibvmi } from '../../src/libvmi/library.js';
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
    expect(error.code).toBe('LIBRARY_INCOMPATIBLE');
    expect(error.message).toBe(`${path} has version 8 of libvmi's events; only version 9 is known`);
    expect(error.remedy).toContain('libvmi 0.15 (events version 9), built with its KVM driver and events');
  });

  test('that has another event layout and lacks functions tells its version first', () => {
    const path = stub('version8-old.so', 8, ['vmi_events_version']);
    expect(errorOf(() => loadLibvmi(path)).message).toContain('has version 8');
  });

  test('that lacks functions names each of them', () => {
    const present = FUNCTION_NAMES.filter((name) => name !== 'vmi_set_mem_event' && name !== 'vmi_init');
    const path = stub('incomplete.so', 9, present);
    const error = errorOf(() => loadLibvmi(path));
    expect(error.code).toBe('LIBRARY_INCOMPATIBLE');
    const reason = 'lacks functions of libvmi: vmi_init, vmi_set_mem_event';
    expect(error.context.candidates).toEqual([{ path, reason }]);
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

  test('takes the environment’s, unless another is asked for; nothing else is looked at', () => {
    process.env[LIBRARY_VARIABLE] = join(directory, 'from-the-environment.so');
    for (const [path, looked] of [
      [undefined, process.env[LIBRARY_VARIABLE]],
      ['/asked/for.so', '/asked/for.so'],
    ] as const) {
      const { code, context } = errorOf(() => loadLibvmi(path));
      expect(code).toBe('LIBRARY_NOT_LOADED');
      expect(context.candidates).toEqual([{ path: looked, reason: expect.stringContaining('No such file') }]);
    }
  });

  test.each(LIBRARIES)('$library is complete', ({ path }) => {
    expect(Object.keys(loadLibvmi(path).functions)).toEqual(FUNCTION_NAMES);
  });
});

// The dynamic linker reads its folders when a process starts, and the bundled library is where the program is: a copy
// of the program without it, in a process of its own.
const BUILT = fileURLToPath(new URL('../../dist', import.meta.url));
const isBuilt = existsSync(BUILT);
if (!isBuilt) {
  // biome-ignore lint/suspicious/noConsole: a skip has to be seen
  console.warn('SKIPPED: "looking for a library" needs dist/: run npm run setup');
}

describe.runIf(isBuilt)('looking for a library', () => {
  let installed: string;
  let program: string;

  beforeEach(() => {
    installed = mkdtempSync(join(directory, 'installed-'));
    program = mkdtempSync(join(directory, 'program-'));
    cpSync(BUILT, join(program, 'dist'), { recursive: true });
    for (const name of ['package.json', 'node_modules']) {
      symlinkSync(fileURLToPath(new URL(`../../${name}`, import.meta.url)), join(program, name));
    }
  });

  function install(name: string, eventsVersion: number): void {
    cpSync(stub('installed.so', eventsVersion, FUNCTION_NAMES), join(installed, name));
  }

  function bundle(eventsVersion: number, name = 'kvmi.so'): string {
    const path = join(program, 'build/Release', name);
    mkdirSync(dirname(path), { recursive: true });
    cpSync(stub('bundled.so', eventsVersion, FUNCTION_NAMES), path);
    return path;
  }

  /** What `loadLibvmi` gives there: the path, or the error. */
  function found(hypervisor: 'kvm' | 'xen', named = ''): Record<string, unknown> {
    const script = `
      import { loadLibvmi } from '${program}/dist/libvmi/library.js';
      let result;
      try {
        result = { path: loadLibvmi(undefined, '${hypervisor}').path };
      } catch ({ code, message, remedy, context }) {
        result = { code, message, remedy, context };
      }
      console.log(JSON.stringify(result));`;
    const env = { ...process.env, LD_LIBRARY_PATH: installed, [LIBRARY_VARIABLE]: named };
    return JSON.parse(
      execFileSync(process.execPath, ['--input-type=module', '-e', script], { env, encoding: 'utf8' }),
    );
  }

  test('the bundled one comes first', () => {
    install('libvmi.so.0', 9);
    const bundled = bundle(9);
    expect(found('kvm')).toEqual({ path: bundled });
  });

  test('without it, an installed libvmi; one of another version is passed over', () => {
    install('libvmi.so.0', 8);
    install('libvmi.so', 9);
    expect(found('kvm')).toEqual({ path: 'libvmi.so' });
    install('libvmi.so.0', 9);
    expect(found('kvm')).toEqual({ path: 'libvmi.so.0' });
  });

  test('each hypervisor has a bundled one of its own, and never gets the other', () => {
    bundle(9);
    install('libvmi.so.0', 9);
    expect(found('xen')).toEqual({ path: 'libvmi.so.0' });
    const bundled = bundle(9, 'xen.so');
    expect(found('xen')).toEqual({ path: bundled });
  });

  test('one that is named is not replaced by another', () => {
    bundle(9);
    install('libvmi.so.0', 9);
    expect(found('kvm', '/nowhere/libvmi.so')).toMatchObject({
      code: 'LIBRARY_NOT_LOADED',
      context: { candidates: [{ path: '/nowhere/libvmi.so' }] },
    });
  });

  test('in vain says of each what is wrong with it, and what is needed', () => {
    const bundled = join(program, 'build/Release/kvmi.so');
    install('libvmi.so.0', 8);
    cpSync(stub('lacking.so', 9, ['vmi_events_version']), join(installed, 'libvmi.so'));
    const { code, message, remedy, context } = found('kvm') as unknown as MemtablesError;
    expect(code).toBe('LIBRARY_NOT_LOADED');
    const [heading, ...lines] = message.split('\n');
    expect(heading).toBe("no library with libvmi's C ABI can be used:");
    expect(lines).toEqual([
      expect.stringMatching(`^  ${bundled} could not be loaded: .*No such file`),
      "  libvmi.so.0 has version 8 of libvmi's events; only version 9 is known",
      expect.stringMatching(/^ {2}libvmi\.so lacks functions of libvmi: vmi_init, vmi_init_paging, /),
    ]);
    expect((context.candidates as Candidate[]).map(({ path, reason }) => `  ${path} ${reason}`)).toEqual(
      lines,
    );
    expect(remedy).toContain('`npm run setup`');
    expect(remedy).toContain('libvmi 0.15 (events version 9), built with its KVM driver and events');
  });

  test('in vain for Xen says what the bundled one needs, or asks for one with its driver', () => {
    for (const name of ['libvmi.so.0', 'libvmi.so']) install(name, 8);
    const { code, remedy } = found('xen') as unknown as MemtablesError;
    expect(code).toBe('LIBRARY_NOT_LOADED');
    expect(remedy).toContain('Xen driver');
    expect(remedy).toContain('libxen-dev');
  });
});

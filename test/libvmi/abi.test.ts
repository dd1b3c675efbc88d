import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { checkAbi } from '../../src/libvmi/abi-check.js';

const OURS = fileURLToPath(new URL('../../native/vmi/include', import.meta.url));
const SCRIPT = fileURLToPath(new URL('../../scripts/check-abi.mjs', import.meta.url));

/** The headers of a private installation: those named, or those beside the library under test. */
const library = process.env.MEMTABLES_TEST_LIBVMI;
const theirs =
  process.env.MEMTABLES_TEST_LIBVMI_INCLUDE || (library && join(dirname(library), '..', 'include'));
const hasTheirs = theirs !== undefined && existsSync(join(theirs, 'libvmi', 'events.h'));
if (!hasTheirs) {
  // biome-ignore lint/suspicious/noConsole: a skip has to be seen
  console.warn('SKIPPED: "libvmi\'s own headers" needs MEMTABLES_TEST_LIBVMI_INCLUDE');
}

describe('every layout and constant is the one that a C compiler sees', () => {
  test('in the bundled library’s headers', () => {
    expect(checkAbi(['-I', OURS]).differences).toEqual([]);
  });

  test.runIf(hasTheirs)('in libvmi’s own headers', () => {
    const { compared, differences } = checkAbi(['-I', theirs!]);
    expect(differences).toEqual([]);
    expect(compared).toBeGreaterThan(200);
  });
});

/** A copy of the bundled library's headers, to edit. */
let include: string;
beforeEach(() => {
  include = mkdtempSync(join(tmpdir(), 'memtables-headers-'));
  cpSync(OURS, include, { recursive: true });
});
afterEach(() => rmSync(include, { recursive: true }));

function edit(header: string, from: string | RegExp, to: string): void {
  const path = join(include, 'libvmi', header);
  const text = readFileSync(path, 'utf8');
  expect(text).toMatch(from);
  writeFileSync(path, text.replace(from, to));
}

function bumpEventsVersion(): void {
  edit('events.h', /(#define VMI_EVENTS_VERSION\s+)\S+/, '$10x0000000a');
}

describe('headers that differ', () => {
  const differing = () => checkAbi(['-I', include]).differences;

  test('in a constant of the binding', () => {
    bumpEventsVersion();
    expect(differing()).toEqual([{ expression: 'VMI_EVENTS_VERSION', ours: 9, theirs: 10 }]);
  });

  test('in a layout that only the bundled library needs', () => {
    edit('libvmi.h', 'npt_base, vmtrace_pos', 'npt_base, padding, vmtrace_pos');
    expect(differing()).toContainEqual({
      expression: 'offsetof(x86_registers_t, vmtrace_pos)',
      ours: 560,
      theirs: 568,
    });
  });

  test('in a name, which they do not have: the others are compared all the same', () => {
    edit('events.h', /\bdont_free\b/g, 'keep');
    bumpEventsVersion();
    expect(differing()).toEqual([
      { expression: 'VMI_EVENTS_VERSION', ours: 9, theirs: 10 },
      { expression: 'offsetof(emul_read_t, dont_free)', ours: 4, theirs: undefined },
      { expression: 'sizeof(((emul_read_t *)0)->dont_free)', ours: 1, theirs: undefined },
    ]);
  });

  test('that cannot be compiled: that is no agreement', () => {
    edit('libvmi.h', /^/, '#include <no/such/header.h>\n');
    expect(differing).toThrow(
      expect.objectContaining({ message: expect.stringContaining('no/such/header.h') }),
    );
  });
});

const isBuilt = existsSync(new URL('../../dist', import.meta.url));
if (!isBuilt) {
  // biome-ignore lint/suspicious/noConsole: a skip has to be seen
  console.warn('SKIPPED: "npm run check:abi" needs dist/: run npm run setup');
}

describe.runIf(isBuilt)('npm run check:abi', () => {
  const check = (args: readonly string[], env = {}) =>
    spawnSync(process.execPath, [SCRIPT, ...args], { encoding: 'utf8', env: { ...process.env, ...env } });

  test('of headers that agree', () => {
    const { status, stderr } = check(['--include', OURS]);
    expect(stderr).toMatch(/^check:abi: \d+ sizes, offsets and constants compared, 0 differ\n$/);
    expect(status).toBe(0);
  });

  test('of headers that differ says which, ours and theirs, and fails', () => {
    bumpEventsVersion();
    const { status, stderr } = check(['--include', include]);
    expect(stderr).toMatch(/^check:abi: VMI_EVENTS_VERSION: ours 9, theirs 10\ncheck:abi: .*, 1 differ\n$/);
    expect(status).toBe(1);
  });

  test('of a folder without headers is no skip', () => {
    const { status, stderr } = check(['--include', '/nowhere']);
    expect(stderr).toContain('there is no libvmi/libvmi.h in /nowhere');
    expect(status).toBe(2);
  });

  test('without headers on the machine is a skip that is said', () => {
    // A compiler that finds none, whatever is installed.
    writeFileSync(join(include, 'cc'), '#!/bin/sh\nexit 1\n', { mode: 0o755 });
    const { status, stderr } = check([], { PATH: include });
    expect(stderr).toContain("SKIPPED: libvmi's headers are not installed");
    expect(status).toBe(0);
  });
});

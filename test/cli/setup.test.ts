import { spawnSync } from 'node:child_process';
import { chmodSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { temporaryDirectory } from './command.js';

const SETUP = fileURLToPath(new URL('../../scripts/setup.mjs', import.meta.url));
const TOOLS = ['npm', 'python3', 'c++', 'make', 'x86_64-w64-mingw32-as'];

let directory: string;
beforeEach(() => {
  directory = temporaryDirectory();
});
afterEach(() => rmSync(directory, { recursive: true }));

/** Runs the set-up on a machine with these tools only, which do nothing but succeed or, given a text, fail on it. */
function setUpWith(tools: Readonly<Record<string, string | undefined>>): {
  code: number | null;
  stderr: string;
} {
  const bin = join(directory, 'bin');
  mkdirSync(bin);
  for (const [name, fails] of Object.entries(tools)) {
    const script = fails === undefined ? 'exit 0' : `case "$*" in *${fails}*) exit 1;; esac`;
    writeFileSync(join(bin, name), `#!/bin/sh\n${script}\n`);
    chmodSync(join(bin, name), 0o755);
  }
  const { status, stderr } = spawnSync(process.execPath, [SETUP], { env: { PATH: bin }, encoding: 'utf8' });
  return { code: status, stderr };
}

const tools = (names: readonly string[]) => Object.fromEntries(names.map((name) => [name, undefined]));

describe('the set-up', () => {
  test('names all that is missing at once, each with what to do', () => {
    const { code, stderr } = setUpWith({});
    expect(code).toBe(1);
    const lines = stderr.trimEnd().split('\n');
    expect(lines).toHaveLength(TOOLS.length);
    for (const line of lines) expect(line).toMatch(/^setup: error: .* is missing: install .*/);
    for (const tool of TOOLS) expect(stderr).toContain(tool);
  });

  test.each(TOOLS)('names %s', (tool) => {
    const { code, stderr } = setUpWith(tools(TOOLS.filter((name) => name !== tool)));
    expect(stderr).toMatch(new RegExp(`^setup: error: .*${tool.replaceAll('+', '\\+')}.* is missing: .*\n$`));
    expect(code).toBe(1);
  });

  test('names pip where python3 comes without', () => {
    const { code, stderr } = setUpWith({ ...tools(TOOLS), python3: 'pip' });
    expect(stderr).toMatch(/^setup: error: pip is missing: install it for python3 .*\n$/);
    expect(code).toBe(1);
  });

  test('does not ask for an assembler that it can install itself', () => {
    const able = { ...tools(TOOLS.filter((name) => name !== 'x86_64-w64-mingw32-as')), 'apt-get': undefined };
    const { stderr } = setUpWith({ ...able, make: '--version' });
    const missing = process.getuid?.() === 0 ? 1 : 2;
    expect(stderr.trimEnd().split('\n')).toHaveLength(missing);
  });
});

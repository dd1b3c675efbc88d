import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { Steps } from '../../src/xen-rig/steps.js';

let folder: string;
let input: string;
let output: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'memtables-steps-'));
  input = join(folder, 'input');
  output = join(folder, 'output');
  writeFileSync(input, 'one');
});
afterEach(() => rmSync(folder, { recursive: true }));

/** How often the step has been run, over a new look at the folder each time. */
function ensure(salt = '', run = () => writeFileSync(output, 'made')): number {
  let runs = 0;
  new Steps(folder, () => {}).ensure({
    name: 'step',
    what: 'making the output',
    inputs: [input],
    salt,
    outputs: [output],
    run: () => {
      runs++;
      run();
    },
  });
  return runs;
}

test('what has not changed is not made again; a changed input, salt or a lost output is a reason', () => {
  expect(ensure()).toBe(1);
  expect(ensure()).toBe(0);
  writeFileSync(input, 'two');
  expect(ensure()).toBe(1);
  expect(ensure('salt')).toBe(1);
  expect(ensure('salt')).toBe(0);
  rmSync(output);
  expect(ensure('salt')).toBe(1);
});

test('what was interrupted is made again, though its output is there and nothing has changed since its last success', () => {
  ensure();
  writeFileSync(input, 'two');
  expect(() =>
    ensure('', () => {
      throw new Error('no space left');
    }),
  ).toThrow('no space left');
  writeFileSync(input, 'one');
  expect(ensure()).toBe(1);
});

import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import {
  HOOK_REFUSALS,
  hookRefusal,
  LOAD_REFUSALS,
  loadRefusal,
  RELOCATION_REFUSALS,
} from '../../src/cli/reasons.js';

const DOC = readFileSync(new URL('../../docs/refusals.md', import.meta.url), 'utf8');

describe('the words of a refusal', () => {
  test('are explained in the documentation as in the program', () => {
    const tables = DOC.split('|---|---|\n').slice(1);
    const explained = tables.map((text) =>
      Object.fromEntries(
        [...text.matchAll(/^\| `(.*)` \| (.*) \|$/gm)].map(([, word, meaning]) => [word, meaning]),
      ),
    );
    expect(explained).toEqual([LOAD_REFUSALS, RELOCATION_REFUSALS, HOOK_REFUSALS]);
  });

  test('mean the same of a table, where they can', () => {
    expect(loadRefusal('table-pageable')).toBe(`of the table: ${loadRefusal('pageable')}`);
    expect(loadRefusal('table-outside-image')).toBe(LOAD_REFUSALS['table-outside-image']);
  });

  test('that are not known mean nothing', () => {
    for (const word of ['toString', 'constructor', 'table-', 'table-toString', '']) {
      expect([word, loadRefusal(word), hookRefusal(word)]).toEqual([word, undefined, undefined]);
    }
    expect(hookRefusal(7)).toBeUndefined();
  });
});

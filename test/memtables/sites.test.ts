import { expect, test } from 'vitest';
import type { Redirection } from '../../src/memtables/redirections.js';
import { ignoreAll, SiteTable } from '../../src/memtables/sites.js';

test('a switch whose two loads were replaced by one handler is left alone once', () => {
  const sites = new SiteTable();
  const redirection = {} as Redirection;
  const loads = [sites.find(1n, 100n)!, sites.find(8n, 200n)!];
  const other = sites.find(16n, 300n)!;
  for (const load of loads) sites.replace(load, redirection);
  ignoreAll(sites.replacedBy(redirection), 'overwritten-by-guest');
  expect(loads.map(({ state }) => state)).toEqual(['ignored', 'ignored']);
  expect(loads.flatMap(({ refusal }) => refusal ?? [])).toEqual(['overwritten-by-guest']);
  expect(other.state).toBe('counted');
});

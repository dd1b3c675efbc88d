import fc from 'fast-check';
import { expect, it } from 'vitest';
import { Worklist } from '../../src/switches/worklist.js';

it('gives back what was put in, each once and the lowest first, between any adds', () => {
  const command = fc.oneof(fc.nat(40), fc.constant('take' as const));
  fc.assert(
    fc.property(fc.array(command, { maxLength: 200 }), (commands) => {
      const list = new Worklist();
      const model = new Set<number>();
      for (const next of commands) {
        if (next !== 'take') {
          list.add(next);
          model.add(next);
          continue;
        }
        const lowest = model.size === 0 ? undefined : Math.min(...model);
        expect(list.take()).toBe(lowest);
        if (lowest !== undefined) model.delete(lowest);
      }
      const rest = [...model].sort((a, b) => a - b);
      for (const address of rest) expect(list.take()).toBe(address);
      expect(list.take()).toBeUndefined();
    }),
  );
});

it('is empty after clear, and takes the same addresses again', () => {
  const list = new Worklist();
  list.add(7);
  list.clear();
  expect(list.take()).toBeUndefined();
  list.add(7);
  expect(list.take()).toBe(7);
});

import { describe, expect, it } from 'vitest';
import { affordable, type HandlerChoice, passedOver, planHandlers } from '../../src/handlers/planner.js';
import type { FoundSwitch } from '../../src/switches/table.js';

const IMAGE_BASE = 0xffff_f800_0000_0000n;

/** `mov ecx, [rdx+rax*4+table]`, with this many entries. */
function proof(entries: number): FoundSwitch {
  const part = (rva: number, length: number) => ({ rva, length, isBranchTarget: false });
  return {
    found: true,
    form: 'one-level',
    ...part(0x1000, 7),
    table: 0x2000,
    entries,
    values: Array.from({ length: entries }, (_, k) => 0x3000 + 8 * k),
    destination: 'rcx',
    base: 'rdx',
    index: 'rax',
    baseIsImageBase: true,
    byteTable: undefined,
    back: 0x1007,
    add: { ...part(0x1007, 3), bytes: Buffer.from('4803ca', 'hex') },
    jmp: { ...part(0x100a, 2), retpoline: false },
    adjacent: true,
    evidence: 'guard',
    liveAtCases: new Map(),
  };
}

const plan = (entries: number, choice: HandlerChoice = 'auto') =>
  planHandlers(proof(entries), IMAGE_BASE, choice);
const names = (plans: readonly { readonly name: string }[]) => plans.map(({ name }) => name);

describe('the handlers of a load', () => {
  it('come with their bytes, the fastest first', () => {
    const sizes = plan(16).map((each) => [each.name, each.refused ?? each.size]);
    expect(sizes).toEqual([
      ['fused', 15 + 14 + 15 * 16 + 13],
      ['lean-roomy', 15 + 14 + 15 * 16 + 10],
      ['lean-dense', 14 + 16 * 10],
      ['lean-tight', 10 + 16 * 8 + 5],
      ['seed', 47 + 16 * 11],
    ]);
  });

  it('are those of one encoder, when that is wished', () => {
    expect(names(plan(16, 'seed'))).toEqual(['seed']);
    expect(names(plan(16, 'lean'))).toEqual(['lean-roomy', 'lean-dense', 'lean-tight']);
    expect(names(plan(16, 'fused'))).toEqual(['fused']);
  });

  it('a refusal keeps its reason, and stands in no way of the others', () => {
    const plans = plan(32);
    expect(plans.find(({ name }) => name === 'lean-tight')?.refused).toBe('too-many-entries-for-short-jumps');
    expect(names(affordable(plans, Infinity))).toEqual(['fused', 'lean-roomy', 'lean-dense', 'seed']);
    expect(affordable(plan(257), Infinity)).toEqual([]);
  });
});

describe('the whole switch is left to its own code, and only the load replaced,', () => {
  const at = { rva: 0x1007, length: 3, isBranchTarget: true };
  it.each([
    ['not-adjacent', { adjacent: false }],
    ['branch-target', { add: { ...proof(4).add, ...at } }],
    ['branch-target', { jmp: { ...proof(4).jmp, isBranchTarget: true } }],
    ['retpoline', { jmp: { ...proof(4).jmp, retpoline: true } }],
    // Prefixes that change nothing.
    ['add-too-long', { add: { ...proof(4).add, bytes: Buffer.from('2e2e2e2e4803ca', 'hex') } }],
  ] as const)('%s', (reason, change) => {
    const plans = planHandlers({ ...proof(4), ...change }, IMAGE_BASE, 'auto');
    const [taken] = affordable(plans, Infinity);
    expect(taken!.name).toBe('lean-roomy');
    expect(passedOver(plans, taken!)).toEqual({ fused: reason });
  });
});

describe('little slack', () => {
  it('leaves only the smaller handlers, the smallest in any case', () => {
    const plans = plan(16);
    expect(names(affordable(plans, 282 * 32))[0]).toBe('fused');
    expect(names(affordable(plans, 282 * 32 - 1))[0]).toBe('lean-roomy');
    expect(names(affordable(plans, 267 * 32 - 1))[0]).toBe('lean-dense');
    expect(names(affordable(plans, 174 * 32 - 1))[0]).toBe('lean-tight');
    expect(names(affordable(plans, 0))).toEqual(['lean-tight', 'seed']);
  });

  it('does not bring in the slow seed where that is a few bytes smaller', () => {
    const registers = { destination: 'r9', index: 'r9' } as const;
    const plans = planHandlers({ ...proof(64), ...registers }, IMAGE_BASE, 'auto');
    expect(names(affordable(plans, 0))).toEqual(['lean-dense', 'seed']);
  });

  it('is the reason why a faster one was passed over; slower ones are not mentioned', () => {
    const plans = plan(32);
    const [taken] = affordable(plans, 0);
    expect(taken!.name).toBe('lean-dense');
    expect(passedOver(plans, taken!)).toEqual({
      fused: 'too-little-slack',
      'lean-roomy': 'too-little-slack',
    });
  });
});

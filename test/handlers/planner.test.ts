import { describe, expect, it } from 'vitest';
import {
  affordable,
  type Candidate,
  ENCODERS,
  type HandlerChoice,
  type HandlerPlanning,
  passedOver,
  planHandlers,
} from '../../src/handlers/planner.js';
import type { ByteTable, FoundSwitch } from '../../src/switches/table.js';

const IMAGE_BASE = 0xffff_f800_0000_0000n;

/** `add r9, rdx` */
const R9 = { rva: 0x1007, length: 3, isBranchTarget: false, bytes: Buffer.from('4c03ca', 'hex') };

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

/** The same behind `movzx eax, byte [rdx+rax+...]`. */
function twoLevel(change: Partial<ByteTable> = {}): FoundSwitch {
  const byteTable: ByteTable = {
    ...{ rva: 0xff8, length: 8, isBranchTarget: false, table: 0x2010, entries: 84 },
    values: Array.from({ length: 84 }, (_, k) => (k % 5 === 0 ? (k / 5) % 4 : 0)),
    ...{ destination: 'rax', base: 'rdx', index: 'rax' },
    ...change,
  };
  return { ...proof(4), form: 'two-level', byteTable };
}

const plan = (entries: number, choice: HandlerChoice = 'auto') =>
  planHandlers(proof(entries), IMAGE_BASE, choice);
const names = (plans: readonly { readonly name: string }[]) => plans.map(({ name }) => name);
const sizes = (plans: readonly HandlerPlanning[]) =>
  plans.map((each) => [each.name, each.refused ?? each.size]);

describe('the handlers of a load', () => {
  it('come with their bytes, the fastest first', () => {
    expect(sizes(plan(16))).toEqual([
      ['inline', 16 * 8 + 16 * 13],
      ['fused', 15 + 13 + 15 * 16 + 13],
      ['lean-roomy', 15 + 13 + 15 * 16 + 10],
      ['lean-dense', 13 + 16 * 10],
      ['lean-tight', 10 + 16 * 8 + 5],
      ['lean-short', 'too-many-entries-for-short-jumps'],
      ['seed', 47 + 16 * 11],
    ]);
  });

  it('are those of one encoder, when that is wished', () => {
    expect(names(plan(4, 'seed'))).toEqual(['seed']);
    expect(names(plan(4, 'lean'))).toEqual(['lean-roomy', 'lean-dense', 'lean-tight']);
    expect(names(plan(4, 'fused'))).toEqual(['fused', 'fused-shared', 'fused-short']);
  });

  it('are smallest, and fastest, inline where no case needs what the switch leaves', () => {
    const dead = { registers: new Set<never>(), flags: false };
    const found = proof(16);
    const liveAtCases = new Map(found.values.map((entry) => [entry, dead]));
    const [inline] = planHandlers({ ...found, liveAtCases }, IMAGE_BASE, 'auto');
    expect(inline).toMatchObject({ name: 'inline', size: 15 * 8 + 5 });
    expect((inline as Candidate).size).toBeLessThan(143); // that of lean-tight
  });

  it('a refusal keeps its reason, and stands in no way of the others', () => {
    const plans = plan(32);
    expect(plans.find(({ name }) => name === 'lean-tight')?.refused).toBe('too-many-entries-for-short-jumps');
    expect(names(affordable(plans, Infinity))).toEqual([
      'inline',
      'fused',
      'lean-roomy',
      'lean-dense',
      'seed',
    ]);
  });

  it('a refusal is that of the switch, not of a packing that its blocks do not fit into', () => {
    // add rdx, r8
    const add = { ...proof(4).add, bytes: Buffer.from('4903d0', 'hex') };
    const ofBase = { ...proof(200), destination: 'rdx', add } as const;
    expect(sizes(planHandlers(ofBase, IMAGE_BASE, 'inline'))).toEqual([
      ['inline', 'site-too-short-for-inline'],
    ]);
  });

  it('are possible for 8,192 entries, the seed for 256', () => {
    const possible = (entries: number) => names(affordable(plan(entries), Infinity));
    expect(possible(257)).toEqual(['inline', 'fused', 'lean-roomy', 'lean-dense']);
    expect(possible(8192)).toEqual(['inline', 'fused', 'lean-roomy', 'lean-dense']);
    expect(possible(8193)).toEqual([]);
  });

  it('are smaller where many entries are alike', () => {
    const alike = { ...proof(200), values: Array.from({ length: 200 }, (_, k) => 0x3000 + (k % 3)) };
    const plans = planHandlers(alike, IMAGE_BASE, 'auto').filter(({ refused }) => refused === undefined);
    expect(sizes(plans)).toEqual([
      ['inline', 200 * 8 + 3 * 13],
      ['fused', 15 + 13 + 199 * 16 + 13],
      ['fused-spread', 10 + 200 * 8 + 3 * 13],
      ['fused-shared', 13 + 200 * 5 + 3 * 13],
      ['lean-roomy', 15 + 13 + 199 * 16 + 10],
      ['lean-dense', 13 + 200 * 10],
      ['lean-shared', 13 + 200 * 5 + 3 * 10],
      ['seed', 47 + 200 * 11],
    ]);
  });
});

describe('a two-level switch', () => {
  it('is one decision: one handler for both loads, or one for each', () => {
    const all = planHandlers(twoLevel(), IMAGE_BASE, 'auto');
    expect(all[0]).toMatchObject({ name: 'inline', parts: { length: 1 } });
    const plans = all.filter(({ encoder }) => encoder !== 'inline');
    const [byteLoad, load] = [IMAGE_BASE + 0xff8n, IMAGE_BASE + 0x1000n];
    const replaced = affordable(plans, Infinity).map(({ name, parts }) => [
      name,
      ...parts.map(({ replaces }) => replaces),
    ]);
    expect(replaced).toEqual([
      ['fused', [byteLoad, load]],
      ['fused-spread', [byteLoad, load]],
      ['fused-shared', [byteLoad, load]],
      ['lean-roomy', [byteLoad, load]],
      ['lean-shared', [byteLoad, load]],
      ['seed', [byteLoad], [load]],
    ]);
    expect(sizes(plans)).toEqual([
      ['fused', 13 + 83 * 18 + 18],
      ['fused-spread', 10 + 84 * 8 + 4 * 18],
      ['fused-shared', 13 + 84 * 5 + 4 * 18],
      ['lean-roomy', 15 + 13 + 83 * 16 + 15],
      ['lean-shared', 13 + 84 * 5 + 4 * 15],
      ['seed', 47 + 84 * 11 + 47 + 4 * 11],
    ]);
  });

  it('has a lean handler for each load where the loads do not stand together', () => {
    const plans = planHandlers(twoLevel({ rva: 0xff0 }), IMAGE_BASE, 'lean');
    const [byteLoad, load] = [IMAGE_BASE + 0xff0n, IMAGE_BASE + 0x1000n];
    expect(affordable(plans, Infinity).map(({ parts }) => parts.map(({ replaces }) => replaces))).toEqual(
      Array(3).fill([[byteLoad], [load]]),
    );
    expect(sizes(plans).filter(([name]) => name !== 'lean-short')).toEqual([
      ['lean-roomy', 15 + 13 + 83 * 16 + 10 + 15 + 13 + 3 * 16 + 10],
      ['lean-dense', 13 + 84 * 10 + 13 + 4 * 10],
      ['lean-tight', 13 + 84 * 5 + 4 * 10 + 10 + 4 * 8 + 5],
    ]);
  });

  it.each([
    ['another register than the index', { destination: 'rbx' }, false],
    ['its own, but something branches to the second load', {}, true],
  ] as const)(
    'has a lean handler for each load where the byte comes into %s',
    (_, change, isBranchTarget) => {
      const [lean] = planHandlers({ ...twoLevel(change), isBranchTarget }, IMAGE_BASE, 'lean');
      expect(lean).toMatchObject({ parts: { length: 2 } });
    },
  );

  it.each([
    ['other code stands between its loads', twoLevel({ rva: 0xff0 })],
    ['its bytes come into another register than the index', twoLevel({ destination: 'rbx' })],
    ['something branches to its second load', { ...twoLevel(), isBranchTarget: true }],
  ])('has a handler for its byte load and a fused one for the rest where %s', (_, found) => {
    const [fused] = planHandlers(found, IMAGE_BASE, 'fused');
    if (fused!.refused !== undefined) throw new Error(fused!.refused);
    expect(fused!.name).toBe('fused');
    const [byteLoad, rest] = fused!.parts;
    expect(byteLoad!.replaces).toEqual([IMAGE_BASE + BigInt(found.byteTable!.rva)]);
    expect(rest!.replaces).toEqual([IMAGE_BASE + 0x1000n]);
    expect(fused!.size).toBe(13 + 84 * 5 + 4 * 10 + 15 + 13 + 3 * 16 + 13);
  });
});

describe('a two-level switch whose byte load has to stay as it is', () => {
  const found = twoLevel({ refused: 'bound-not-proven' });
  it.each([
    ['together with it', found],
    ['apart from it', { ...found, byteTable: { ...found.byteTable!, rva: 0xff0 } }],
    ['behind a guard', { ...found, evidence: 'none' as const }],
  ])('has handlers for its dword load only: %s', (_, site) => {
    const replaced = ['auto', ...ENCODERS].flatMap((choice) =>
      affordable(planHandlers(site, IMAGE_BASE, choice as HandlerChoice), Infinity).map(({ parts }) =>
        parts.map(({ replaces }) => replaces),
      ),
    );
    expect(replaced.length).toBeGreaterThan(0);
    expect(replaced).toEqual(Array(replaced.length).fill([[IMAGE_BASE + 0x1000n]]));
  });
});

describe('a table whose end is not proven', () => {
  const unproven = { ...proof(4), evidence: 'none' } as const;
  const two = { ...twoLevel(), evidence: 'none' } as const;

  it.each([unproven, two])('has handlers with a guard only: $form', (found) => {
    expect(planHandlers(found, IMAGE_BASE, 'auto').map(({ encoder }) => encoder)).toContain('guarded');
    for (const choice of ['auto', ...ENCODERS] as const) {
      const possible = affordable(planHandlers(found, IMAGE_BASE, choice), Infinity);
      expect(new Set(possible.map(({ encoder }) => encoder))).toEqual(
        new Set(choice === 'auto' || choice === 'guarded' ? ['guarded'] : []),
      );
    }
    expect(sizes(planHandlers(found, IMAGE_BASE, 'lean'))).toEqual([['lean', 'bound-not-proven']]);
  });

  it('has none where its byte load stands apart, or its flags would have to be saved', () => {
    const apart = { ...two, byteTable: { ...two.byteTable!, rva: 0xff0 } };
    expect(sizes(planHandlers(apart, IMAGE_BASE, 'auto'))).toEqual([['guarded', 'not-adjacent']]);
    const unlike = { ...unproven, adjacent: false };
    expect(sizes(planHandlers(unlike, IMAGE_BASE, 'auto'))).toEqual([['guarded', 'not-adjacent']]);
  });

  it('keeps a copy of the load, which an index beyond reaches', () => {
    const [guarded] = affordable(planHandlers(two, IMAGE_BASE, 'auto'), Infinity);
    // From beyond the bound, the second load is still executed.
    expect(guarded!.parts[0]!.replaces).toEqual([IMAGE_BASE + 0xff8n]);
    const plan = guarded!.parts[0]!.at(IMAGE_BASE + 0x10_0000n);
    if (plan.refused !== undefined) throw new Error(plan.refused);
    const { gva, bytes } = plan.handler;
    // movzx eax, byte [rdx + rax + 0x2010]
    expect(bytes.subarray(Number(plan.fallback! - gva)).toString('hex')).toMatch(/^0fb6840210200000e9/);
    // cmp rax, 83; ja fallback
    expect(bytes.subarray(0, plan.blocks).toString('hex')).toContain('4883f8530f87');
  });

  it('is not what the guard is for by default', () => {
    expect(plan(4).filter(({ encoder }) => encoder === 'guarded')).toEqual([]);
    expect(affordable(plan(4, 'guarded'), Infinity).length).toBeGreaterThan(0);
  });
});

describe('the whole switch is left to its own code, and only the load replaced,', () => {
  const at = { rva: 0x1007, length: 3, isBranchTarget: true };
  it.each([
    ['not-adjacent', { adjacent: false }],
    ['branch-target', { add: { ...proof(4).add, ...at } }],
    ['branch-target', { jmp: { ...proof(4).jmp, isBranchTarget: true } }],
    ['retpoline', { jmp: { ...proof(4).jmp, retpoline: true } }],
    ['another-add', { add: { ...proof(4).add, bytes: Buffer.from('4803d1', 'hex') } }],
  ] as const)('%s', (reason, change) => {
    const plans = planHandlers({ ...proof(4), ...change }, IMAGE_BASE, 'auto');
    const [taken] = affordable(plans, Infinity);
    expect(taken!.name).toBe('lean-roomy');
    expect(passedOver(plans, taken!)).toEqual({ inline: reason, fused: reason });
  });
});

describe('little slack', () => {
  it('leaves only the smaller handlers, the smallest in any case', () => {
    const plans = plan(16);
    const fastest = (slack: number) => names(affordable(plans, slack))[0];
    const kept = 10_240;
    expect(fastest(kept + (281 - 143) * 16)).toBe('fused');
    expect(fastest(kept + (281 - 143) * 16 - 1)).toBe('lean-roomy');
    expect(fastest(kept + (278 - 143) * 16 - 1)).toBe('lean-dense');
    expect(fastest(kept + (173 - 143) * 16 - 1)).toBe('lean-tight');
    expect(names(affordable(plans, 0))).toEqual(['lean-tight', 'seed']);
  });

  it.each([12_000, 20_000])(
    'of %d bytes is enough for a hundred tables of 10 entries, the first roomy',
    (slack) => {
      const taken = Array.from({ length: 100 }, () => {
        const [candidate] = affordable(plan(10), slack);
        slack -= candidate!.size;
        return candidate!.name;
      });
      expect(slack).toBeGreaterThan(0);
      expect(taken[0]).toMatch(/inline/);
      expect(taken.at(-1)).toBe('lean-tight');
    },
  );

  it('does not bring in the slow seed where that is a few bytes smaller', () => {
    const registers = { destination: 'r9', index: 'r9' } as const;
    const plans = planHandlers({ ...proof(64), ...registers, add: R9 }, IMAGE_BASE, 'auto');
    expect(names(affordable(plans, 0))).toEqual(['lean-dense', 'seed']);
  });

  it('is the reason why a faster one was passed over; slower ones are not mentioned', () => {
    const plans = plan(32);
    const [taken] = affordable(plans, 0);
    expect(taken!.name).toBe('lean-dense');
    expect(passedOver(plans, taken!)).toEqual({
      inline: 'too-little-slack',
      fused: 'too-little-slack',
      'lean-roomy': 'too-little-slack',
    });
  });
});

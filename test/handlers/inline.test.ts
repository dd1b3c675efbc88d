import { describe, expect, it } from 'vitest';
import type { SwitchPacking } from '../../src/handlers/fused.js';
import { inlineLayout } from '../../src/handlers/inline.js';
import type { LoadSite } from '../../src/handlers/plan.js';
import type { WholeSwitch } from '../../src/handlers/replaced.js';
import { HANDLER, IMAGE_BASE, LOAD } from './load.js';

const NOTHING = { registers: new Set<never>(), flags: false };
/** `add rcx, rdx; jmp rcx` */
const WHOLE: WholeSwitch = {
  load: LOAD,
  entries: [0x35_0000, 0x36_0000],
  add: Buffer.from('4803ca', 'hex'),
  jmpLength: 2,
  liveAt: () => NOTHING,
};
/** `movzx eax, byte [rdx + rbx + ...]` in front of it. */
const BYTE_LOAD: LoadSite = { ...LOAD, gva: LOAD.gva - 8n, length: 8, dst: 'rax', idx: 'rbx' };

function planned(whole: WholeSwitch, packing: SwitchPacking = 'spread', handler = HANDLER) {
  const layout = inlineLayout(whole, packing);
  if (layout.refused !== undefined) return layout;
  const plan = layout.at(handler);
  return plan.refused === undefined ? { ...plan, replaces: layout.replaces } : plan;
}

function placed(...args: Parameters<typeof planned>) {
  const plan = planned(...args);
  if (plan.refused !== undefined) throw new Error(plan.refused);
  return plan;
}

describe('the inline handler', () => {
  it('writes the computed jump over the switch, and jumps from a block straight to its case', () => {
    const { site, handler, interior, replaces } = placed(WHOLE);
    // lea rcx, [rdx + rax*8 + (blocks - base)]; jmp rcx; nop; nop
    expect(site.bytes.toString('hex')).toBe(['488d8cc200007844', 'ffe1', '90'].join('').padEnd(24, '90'));
    expect(handler.bytes.toString('hex')).toBe(['e9fbffbcbb', 'cccccc', 'e9f3ffbdbb', 'cccccc'].join(''));
    expect(interior).toEqual([LOAD.gva + 7n, LOAD.gva + 10n]);
    expect(replaces).toEqual([LOAD.gva]);
  });

  it('sets registers and flags behind the jumps where a case needs them', () => {
    const live = (entry: number) => (entry === 0x36_0000 ? undefined : NOTHING);
    const { handler } = placed({ ...WHOLE, liveAt: live });
    const expected = [
      ...['e9fbffbcbb', 'cccccc', 'e903000000', 'cccccc'],
      ...['b900003600', '4803ca', 'e9e3ffbdbb'],
    ];
    expect(handler.bytes.toString('hex')).toBe(expected.join(''));
  });

  it('takes the place of both loads of a two-level switch', () => {
    const byteLoad = { load: BYTE_LOAD, entries: [1, 0, 1] };
    const { site, handler, interior, replaces } = placed({ ...WHOLE, byteLoad }, 'shared');
    // lea ecx, [rbx + rbx*4]; lea rcx, [rdx + rcx + (blocks - base)]; jmp rcx
    expect(site).toMatchObject({ gva: BYTE_LOAD.gva, bytes: { length: 20 } });
    expect(site.bytes.toString('hex')).toBe(['8d0c9b', '488d8c0a00007844', 'ffe1'].join('').padEnd(40, '90'));
    expect(handler.bytes.toString('hex')).toBe(['e9fbffbdbb', 'e9f6ffbcbb', 'e9f1ffbdbb'].join(''));
    expect(interior).toEqual([LOAD.gva, LOAD.gva + 7n, LOAD.gva + 10n]);
    expect(replaces).toEqual([BYTE_LOAD.gva, LOAD.gva]);
  });

  it('is refused where the computed jump is longer than the switch', () => {
    expect(planned({ ...WHOLE, liveAt: () => undefined }, 'roomy').refused).toBe('site-too-short-for-inline');
    const inBase = { ...WHOLE, load: { ...LOAD, base: 'rcx' } } as const;
    expect(planned(inBase).refused).toBe('site-too-short-for-inline');
  });

  it('is refused where the blocks are more than 2 GB from the base', () => {
    const far = { ...LOAD, baseValue: IMAGE_BASE - 2n ** 31n };
    expect(planned({ ...WHOLE, load: far }).refused).toBe('jump-out-of-range');
  });
});

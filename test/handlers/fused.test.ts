import { describe, expect, it } from 'vitest';
import { type Dispatch, fusedLayout } from '../../src/handlers/fused.js';
import type { TableLoad } from '../../src/handlers/plan.js';
import { HANDLER, IMAGE_BASE, LOAD } from './load.js';

/** `add rcx, rdx; jmp rcx` */
const DISPATCH: Dispatch = { add: Buffer.from('4803ca', 'hex'), imageBase: IMAGE_BASE };

function planned(entries: readonly number[], load: Partial<TableLoad> = {}, handler = HANDLER) {
  const layout = fusedLayout({ ...LOAD, ...load }, DISPATCH, Uint32Array.from(entries));
  return layout.refused === undefined ? layout.at(handler) : layout;
}

describe('the fused handler', () => {
  it('jumps from each block to its case, after the add', () => {
    const plan = planned([0x35_0000, 0x36_0000]);
    if (plan.refused !== undefined) throw new Error(plan.refused);
    const expected = [
      'cccc',
      '488d0c00', // lea rcx, [rax + rax]
      '488d8cca10007844', // lea rcx, [rdx + rcx*8 + (blocks - base)]
      'ffe1', // jmp rcx
      ...['b900003500', '4803ca', 'e9e3ffbcbb', 'cccccc'],
      ...['b900003600', '4803ca', 'e9d3ffbdbb'],
    ];
    // As many bytes are left behind the last block as there could be in front.
    expect(plan.handler.bytes.toString('hex')).toBe(expected.join('').padEnd(2 * (15 + 14 + 29), 'c'));
    expect(plan.site.bytes.length).toBe(7);
  });

  it('is refused as other handlers are', () => {
    expect(planned([]).refused).toBe('no-entries');
    expect(planned(Array(257).fill(0)).refused).toBe('too-many-entries');
    expect(planned([0], { dst: 'rsp' }).refused).toBe('destination-is-rsp');
    expect(planned([0], { dst: 'rax', base: 'rax' }).refused).toBe('no-register-for-address');
  });

  it('is refused when one of its cases is too far away, to the byte', () => {
    // Aligned, with the header in front.
    const block = 0xffff_8000_1210_0010n;
    const [handler, jumpEnd] = [block - 14n, block + 13n];
    const load = { gva: handler };
    const furthest = Number(jumpEnd + 2n ** 31n - 1n - IMAGE_BASE);
    expect(planned([furthest], load, handler).refused).toBeUndefined();
    expect(planned([furthest + 1], load, handler).refused).toBe('jump-out-of-range');
    expect(planned([furthest, furthest + 16], load, handler).refused).toBeUndefined();
    expect(planned([furthest, furthest + 17], load, handler).refused).toBe('jump-out-of-range');
  });
});

import { describe, expect, it } from 'vitest';
import { fusedLayout, type SwitchPacking } from '../../src/handlers/fused.js';
import type { LoadSite } from '../../src/handlers/plan.js';
import { HANDLER, IMAGE_BASE, LOAD } from './load.js';

/** `add rcx, rdx; jmp rcx` */
const ADD = Buffer.from('4803ca', 'hex');

interface Change {
  readonly load?: Partial<LoadSite>;
  readonly packing?: SwitchPacking;
  readonly add?: Buffer;
  readonly handler?: bigint;
}

function planned(
  entries: readonly number[],
  { load = {}, packing = 'roomy', add = ADD, handler = HANDLER }: Change = {},
) {
  const layout = fusedLayout({ load: { ...LOAD, ...load }, entries, add, jmpLength: 2 }, packing);
  return layout.refused === undefined ? layout.at(handler) : layout;
}

/** `movzx eax, byte [rdx + rbx + ...]` in front of the load. */
function twoLevel(bytes: readonly number[], entries: readonly number[], packing: SwitchPacking) {
  const byteLoad = { ...LOAD, gva: LOAD.gva - 8n, length: 8, dst: 'rax', idx: 'rbx' } as const;
  const whole = { load: LOAD, entries, byteLoad: { load: byteLoad, entries: bytes }, add: ADD, jmpLength: 2 };
  const layout = fusedLayout(whole, packing);
  return layout.refused === undefined ? layout.at(HANDLER) : layout;
}

describe('the fused handler', () => {
  it('jumps from each block to its case, after the add', () => {
    const plan = planned([0x35_0000, 0x36_0000]);
    if (plan.refused !== undefined) throw new Error(plan.refused);
    const expected = [
      'cccccc',
      '8d0c00', // lea ecx, [rax + rax]
      '488d8cca10007844', // lea rcx, [rdx + rcx*8 + (blocks - base)]
      'ffe1', // jmp rcx
      ...['b900003500', '4803ca', 'e9e3ffbcbb', 'cccccc'],
      ...['b900003600', '4803ca', 'e9d3ffbdbb'],
    ];
    // As many bytes are left behind the last block as there could be in front.
    expect(plan.handler.bytes.toString('hex')).toBe(expected.join('').padEnd(2 * (15 + 13 + 29), 'c'));
    expect(plan.site.bytes.length).toBe(7);
  });

  it('is refused as other handlers are', () => {
    expect(planned([]).refused).toBe('no-entries');
    expect(planned(Array(8193).fill(0)).refused).toBe('too-many-entries');
    expect(planned([0], { load: { dst: 'rsp' } }).refused).toBe('another-add');
    expect(planned([0], { load: { base: 'rsp' } }).refused).toBe('base-is-rsp');
    expect(planned([0], { load: { idx: 'rcx', base: 'rcx' } }).refused).toBe('no-register-for-address');
  });

  it('is refused when one of its cases is too far away, to the byte', () => {
    // Aligned, with the header in front.
    const block = 0xffff_8000_1210_0010n;
    const [handler, jumpEnd] = [block - 13n, block + 13n];
    const change = { load: { gva: handler }, handler };
    const furthest = Number(jumpEnd + 2n ** 31n - 1n - IMAGE_BASE);
    expect(planned([furthest], change).refused).toBeUndefined();
    expect(planned([furthest + 1], change).refused).toBe('jump-out-of-range');
    expect(planned([furthest, furthest + 16], change).refused).toBeUndefined();
    expect(planned([furthest, furthest + 17], change).refused).toBe('jump-out-of-range');
  });

  it('of a two-level switch leads each index to the block of its byte', () => {
    const plan = twoLevel([1, 0, 1], [0x35_0000, 0x36_0000], 'spread');
    if (plan.refused !== undefined) throw new Error(plan.refused);
    const expected = [
      '488d8cda0a007844', // lea rcx, [rdx + rbx*8 + (blocks - base)]
      'ffe1', // jmp rcx
      ...['e913000000', 'cccccc', 'e91d000000', 'cccccc', 'e903000000', 'cccccc'],
      ...['b801000000', 'b900003600', '4803ca', 'e9ccffbdbb'],
      ...['b800000000', 'b900003500', '4803ca', 'e9baffbcbb'],
    ];
    expect(plan.handler.bytes.toString('hex')).toBe(expected.join(''));
    expect(plan.site).toMatchObject({ gva: LOAD.gva - 8n, bytes: { length: 8 } });
    expect(plan.interior).toEqual([]);
  });

  it('of a two-level switch is refused when a byte leads beyond the entries', () => {
    expect(twoLevel([2], [1, 2], 'spread').refused).toBe('byte-beyond-table');
  });

  it('is refused when the base is not added to the entry', () => {
    for (const add of ['4803d1', '03ca', '4803c9', '482bca', '48030a', '4883c101', '']) {
      expect(planned([0], { add: Buffer.from(add, 'hex') }).refused).toBe('another-add');
    }
  });

  it('does not fit where blocks of 20 bytes are too short: then they are shared', () => {
    const long = { add: Buffer.from('2e2e2e2e2e2e2e2e4803ca', 'hex') };
    expect(planned([0], long).refused).toBe('does-not-fit');
    expect(planned([0], { ...long, packing: 'spread' }).refused).toBeUndefined();
  });
});

import { describe, expect, it } from 'vitest';
import { LEAN_PACKINGS, type LeanPacking, leanLayout } from '../../src/handlers/lean.js';
import type { LoadSite } from '../../src/handlers/plan.js';
import { HANDLER, LOAD } from './load.js';

const ENTRIES = Uint32Array.of(0x1000, 0x2000);

interface Change {
  readonly load?: Partial<LoadSite>;
  readonly entries?: number;
  readonly handler?: bigint;
}

function refused(packing: LeanPacking, { load, entries, handler = HANDLER }: Change) {
  const table = entries === undefined ? ENTRIES : new Uint32Array(entries);
  const layout = leanLayout({ load: { ...LOAD, ...load }, entries: table }, packing);
  return layout.refused ?? layout.at(handler).refused;
}

function bytes(packing: LeanPacking, load: Partial<LoadSite> = {}, entries = ENTRIES) {
  const layout = leanLayout({ load: { ...LOAD, ...load }, entries }, packing);
  if (layout.refused !== undefined) throw new Error(layout.refused);
  const plan = layout.at(HANDLER);
  if (plan.refused !== undefined) throw new Error(plan.refused);
  return plan.handler.bytes.toString('hex');
}

describe('encoding', () => {
  it('roomy: blocks 16 bytes apart, none across a boundary, with bytes between them that are never executed', () => {
    const expected = [
      'cccccc',
      '8d0c00', // lea ecx, [rax + rax]
      '488d8cca10007844', // lea rcx, [rdx + rcx*8 + (blocks - base)]
      'ffe1', // jmp rcx
      ...['b900100000', 'e9edffbbbb', 'cccccccccccc'],
      ...['b900200000', 'e9ddffbbbb'],
    ];
    // As many bytes are left behind the last block as there could be in front.
    expect(bytes('roomy')).toBe(expected.join('').padEnd(2 * (15 + 13 + 26), 'c'));
  });

  it('tight: where the base is the destination, the address is computed on top of RIP', () => {
    const expected = [
      '488d0d06000000', // lea rcx, [rip + 6]
      '488d0cc1', // lea rcx, [rcx + rax*8]
      'ffe1', // jmp rcx
      ...['b900100000', 'eb09', 'cc'],
      ...['b900200000', 'eb01', 'cc'],
      'e9e5ffbbbb', // jmp back
    ];
    expect(bytes('tight', { base: 'rcx' })).toBe(expected.join(''));
  });

  it('dense: r9 as destination, whose blocks have 11 bytes', () => {
    const expected = [
      '4c8d0d0f000000', // lea r9, [rip + 0xf]
      '4d8d0cc1', // lea r9, [r9 + rax*8]
      '4d8d0c41', // lea r9, [r9 + rax*2]
      '4d8d0c01', // lea r9, [r9 + rax]
      '41ffe1', // jmp r9
      ...['41b900100000', 'e9e6ffbbbb'],
      ...['41b900200000', 'e9dbffbbbb'],
    ];
    expect(bytes('dense', { dst: 'r9' })).toBe(expected.join(''));
  });

  it('tight, in place of its own index: short jumps to a shared one', () => {
    const expected = [
      '488d84c20a007844', // lea rax, [rdx + rax*8 + (blocks - base)]
      'ffe0', // jmp rax
      ...['b800100000', 'eb09', 'cc'],
      ...['b800200000', 'eb01', 'cc'],
      'e9e8ffbbbb', // jmp back
    ];
    expect(bytes('tight', { dst: 'rax' })).toBe(expected.join(''));
  });
});

describe.each(LEAN_PACKINGS)('the refusals of %s', (packing) => {
  it.each([
    ['site-too-short', { length: 4 }],
    ['address-size-prefix', { addressBits: 32 }],
    ['destination-not-32-bit', { dstBits: 64 }],
    ['destination-is-rsp', { dst: 'rsp' }],
    ['index-is-rsp', { idx: 'rsp' }],
    ['base-is-rsp', { base: 'rsp' }],
  ] as const)('%s', (reason, load) => {
    expect(refused(packing, { load })).toBe(reason);
  });

  it('no-register-for-address: destination, index and base are the same', () => {
    expect(refused(packing, { load: { dst: 'rax', base: 'rax' } })).toBe('no-register-for-address');
  });

  it('the number of entries', () => {
    expect(refused(packing, { entries: 0 })).toBe('no-entries');
    expect(refused(packing, { entries: 8193 })).toBe('too-many-entries');
    expect(refused(packing, { entries: 31 })).toBeUndefined();
    const beyond = packing === 'tight' ? 'too-many-entries-for-short-jumps' : undefined;
    expect(refused(packing, { entries: 32 })).toBe(beyond);
  });

  describe('jump-out-of-range, to the byte', () => {
    const GB2 = 2n ** 31n;
    // Roomy blocks are aligned: these places are such that it takes no padding.
    const padding = packing === 'roomy' ? 15n : 0n;
    const step = padding + 1n;

    it('forwards, the last jump back must reach', () => {
      const gva = 0xffff_8000_1234_0003n;
      const layout = leanLayout({ load: LOAD, entries: ENTRIES }, packing);
      const size = BigInt(layout.refused === undefined ? layout.size : 0);
      const furthest = gva + 7n + GB2 - (size - padding);
      const load = { gva, baseValue: gva };
      expect(refused(packing, { load, handler: furthest })).toBeUndefined();
      expect(refused(packing, { load, handler: furthest + 1n })).toBe('jump-out-of-range');
    });

    it('backwards, the site must reach the handler', () => {
      const gva = 0xffff_8000_1234_000dn;
      const nearest = gva + 5n - GB2;
      const load = { gva, baseValue: nearest };
      expect(refused(packing, { load, handler: nearest })).toBeUndefined();
      expect(refused(packing, { load, handler: nearest - step })).toBe('jump-out-of-range');
    });

    it('the base must reach the blocks', () => {
      const load = { dst: 'rax', baseValue: HANDLER - GB2 } as const;
      expect(refused(packing, { load })).toBe('jump-out-of-range');
      expect(refused(packing, { load: { ...load, baseValue: HANDLER - GB2 + 64n } })).toBeUndefined();
    });
  });
});

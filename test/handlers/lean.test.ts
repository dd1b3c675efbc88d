import { describe, expect, it } from 'vitest';
import { LEAN_PACKINGS, type LeanPacking, leanLayout } from '../../src/handlers/lean.js';
import type { TableLoad } from '../../src/handlers/plan.js';

/** `mov ecx, dword ptr [rdx+rax*4+...]` */
const LOAD: TableLoad = {
  gva: 0xffff_8000_1234_0000n,
  length: 7,
  dst: 'rcx',
  dstBits: 32,
  idx: 'rax',
  base: 'rdx',
  baseValue: 0xffff_8000_1200_0000n,
  addressBits: 64,
};
const HANDLER = 0xffff_8000_5678_0000n;
const ENTRIES = Uint32Array.of(0x1000, 0x2000);

interface Change {
  readonly load?: Partial<TableLoad>;
  readonly entries?: number;
  readonly handler?: bigint;
}

function refused(packing: LeanPacking, { load, entries, handler = HANDLER }: Change) {
  const table = entries === undefined ? ENTRIES : new Uint32Array(entries);
  const layout = leanLayout({ ...LOAD, ...load }, table, packing);
  return layout.refused ?? layout.at(handler).refused;
}

function bytes(packing: LeanPacking, load: Partial<TableLoad> = {}, entries = ENTRIES) {
  const layout = leanLayout({ ...LOAD, ...load }, entries, packing);
  if (layout.refused !== undefined) throw new Error(layout.refused);
  const plan = layout.at(HANDLER);
  if (plan.refused !== undefined) throw new Error(plan.refused);
  return plan.handler.bytes.toString('hex');
}

describe('encoding', () => {
  it('roomy: blocks 16 bytes apart, with code between them that is never executed', () => {
    const expected = [
      '488d0d0a000000', // lea rcx, [rip + 0xa]
      '488d0cc1', // lea rcx, [rcx + rax*8]
      '488d0cc1',
      'ffe1', // jmp rcx
      ...['b900100000', 'e9ecffbbbb', 'cccccccccccc'],
      ...['b900200000', 'e9dcffbbbb'],
    ];
    expect(bytes('roomy')).toBe(expected.join(''));
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

  it('no-register-for-address: dst is idx, and the base is not known, or is dst too', () => {
    const { baseValue, ...unknown } = LOAD;
    expect(leanLayout({ ...unknown, dst: 'rax' }, ENTRIES, packing).refused).toBe('no-register-for-address');
    expect(refused(packing, { load: { dst: 'rax', base: 'rax' } })).toBe('no-register-for-address');
    expect(leanLayout(unknown, ENTRIES, packing).refused).toBeUndefined();
  });

  it('the number of entries', () => {
    expect(refused(packing, { entries: 0 })).toBe('no-entries');
    expect(refused(packing, { entries: 257 })).toBe('too-many-entries');
    expect(refused(packing, { entries: 31 })).toBeUndefined();
    const beyond = packing === 'tight' ? 'too-many-entries-for-short-jumps' : undefined;
    expect(refused(packing, { entries: 32 })).toBe(beyond);
  });

  describe('jump-out-of-range, to the byte', () => {
    const GB2 = 2n ** 31n;
    const back = LOAD.gva + BigInt(LOAD.length);

    it('forwards, the last jump back must reach', () => {
      const layout = leanLayout(LOAD, ENTRIES, packing);
      const size = BigInt(layout.refused === undefined ? layout.size : 0);
      expect(refused(packing, { handler: back + GB2 - size })).toBeUndefined();
      expect(refused(packing, { handler: back + GB2 - size + 1n })).toBe('jump-out-of-range');
    });

    it('backwards, the site must reach the handler', () => {
      expect(refused(packing, { handler: LOAD.gva + 5n - GB2 })).toBeUndefined();
      expect(refused(packing, { handler: LOAD.gva + 5n - GB2 - 1n })).toBe('jump-out-of-range');
    });

    it('where dst is idx, the base must reach the blocks', () => {
      const load = { dst: 'rax', baseValue: HANDLER - GB2 } as const;
      expect(refused(packing, { load })).toBe('jump-out-of-range');
      expect(refused(packing, { load: { ...load, baseValue: HANDLER - GB2 + 64n } })).toBeUndefined();
    });
  });
});

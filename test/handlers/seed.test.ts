import { describe, expect, it } from 'vitest';
import type { LoadSite } from '../../src/handlers/plan.js';
import { SEED_BLOCK_SIZE, SEED_HEADER_SIZE, SEED_MOST_ENTRIES, seedLayout } from '../../src/handlers/seed.js';
import { GPR_NAMES } from '../../src/x86/registers.js';
import { HANDLER, LOAD } from './load.js';

const ENTRIES = Uint32Array.of(0x1000, 0x2000, 0x3000, 0x4000);

function planned(load: Partial<LoadSite> = {}, entries = ENTRIES, handler = HANDLER) {
  const layout = seedLayout({ ...LOAD, ...load }, entries);
  if (layout.refused !== undefined) throw new Error(`refused: ${layout.refused}`);
  const plan = layout.at(handler);
  if (plan.refused !== undefined) throw new Error(`refused: ${plan.refused}`);
  expect(layout.size).toBe(plan.handler.bytes.length);
  return plan;
}

function refused(load: Partial<LoadSite>, entries = ENTRIES, handler = HANDLER) {
  const layout = seedLayout({ ...LOAD, ...load }, entries);
  return layout.refused ?? layout.at(handler).refused;
}

function hexBytes(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}

describe('encoding', () => {
  it("the example of HVMI's documentation, byte for byte", () => {
    const plan = planned();
    const expected = [
      '9c', // pushfq
      '4851', // push rcx
      '4850', // push rax
      'c74424082f007856', // mov dword [rsp+8], 0x5678002f
      'c744240c0080ffff', // mov dword [rsp+12], 0xffff8000
      '486bc00b', // imul rax, rax, 11
      '4801442408', // add [rsp+8], rax
      '4858', // pop rax
      '4859', // pop rcx
      '48c74424f800000000', // mov qword [rsp-8], 0
      '9d', // popfq
      '40ffe1', // jmp rcx
      ...['40b900100000', 'e9cdffbbbb'],
      ...['40b900200000', 'e9c2ffbbbb'],
      ...['40b900300000', 'e9b7ffbbbb'],
      ...['40b900400000', 'e9acffbbbb'],
    ];
    expect(hexBytes(plan.handler.bytes)).toBe(expected.join(''));
    expect(plan.handler.gva).toBe(HANDLER);
    expect(plan.blocks).toBe(0x2f);
    expect(plan.site).toEqual({ gva: LOAD.gva, bytes: Buffer.from('e9fbff43449090', 'hex') });
  });

  it.each([
    ['r9', 'r10', '9c 4951 4952', '4d6bd20b 4c01542408 495a 4959', '41ffe1', '41b9'],
    ['rcx', 'r12', '9c 4851 4954', '4d6be40b 4c01642408 495c 4859', '40ffe1', '40b9'],
    ['r13', 'rbp', '9c 4955 4855', '486bed0b 48016c2408 485d 495d', '41ffe5', '41bd'],
    ['rdi', 'rdi', '9c 4857 4857', '486bff0b 48017c2408 485f 485f', '40ffe7', '40bf'],
  ] as const)('dst %s, idx %s', (dst, idx, pushes, computation, jump, block) => {
    const bytes = hexBytes(planned({ dst, idx }).handler.bytes);
    const compact = (text: string) => text.replaceAll(' ', '');
    expect(bytes.slice(0, 10)).toBe(compact(pushes));
    expect(bytes.slice(42, 68)).toBe(compact(computation));
    expect(bytes.slice(88, 94)).toBe(jump);
    expect(bytes.slice(94, 98)).toBe(block);
  });

  it('has one size for all choices of registers', () => {
    for (const dst of GPR_NAMES) {
      for (const idx of GPR_NAMES) {
        if (dst === 'rsp' || idx === 'rsp') continue;
        const { handler, site } = planned({ dst, idx, length: 8 });
        expect(handler.bytes.length).toBe(SEED_HEADER_SIZE + 4 * SEED_BLOCK_SIZE);
        expect(site.bytes.length).toBe(8);
      }
    }
  });

  it('takes 256 entries', () => {
    expect(planned({}, new Uint32Array(SEED_MOST_ENTRIES)).handler.bytes.length).toBe(47 + 256 * 11);
  });
});

describe('refusal', () => {
  it.each([
    ['site-too-short', { length: 4 }],
    ['address-size-prefix', { addressBits: 32 }],
    ['destination-not-32-bit', { dstBits: 64 }],
    ['destination-not-32-bit', { dstBits: 16 }],
    ['destination-is-rsp', { dst: 'rsp' }],
    ['index-is-rsp', { idx: 'rsp' }],
    ['base-is-rsp', { base: 'rsp' }],
  ] as const)('%s', (reason, change) => {
    expect(refused(change)).toBe(reason);
  });

  it('no-entries', () => {
    expect(refused({}, new Uint32Array(0))).toBe('no-entries');
  });

  it('too-many-entries', () => {
    expect(refused({}, new Uint32Array(SEED_MOST_ENTRIES + 1))).toBe('too-many-entries');
  });

  it('a site of five bytes is long enough', () => {
    expect(planned({ length: 5 }).site.bytes.length).toBe(5);
  });

  describe('jump-out-of-range, to the byte', () => {
    const afterJump = LOAD.gva + 5n;
    const back = LOAD.gva + 7n;
    const GB2 = 2n ** 31n;
    const lastBlockEnd = BigInt(SEED_HEADER_SIZE + ENTRIES.length * SEED_BLOCK_SIZE);

    it('forwards, the last block must reach back', () => {
      const furthest = back + GB2 - lastBlockEnd;
      expect(refused({}, ENTRIES, furthest)).toBeUndefined();
      expect(refused({}, ENTRIES, furthest + 1n)).toBe('jump-out-of-range');
    });

    it('backwards, the site must reach the handler', () => {
      expect(refused({}, ENTRIES, afterJump - GB2)).toBeUndefined();
      expect(refused({}, ENTRIES, afterJump - GB2 - 1n)).toBe('jump-out-of-range');
    });
  });
});

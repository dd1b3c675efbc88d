import { describe, expect, it } from 'vitest';
import { encodeJump, rel32 } from '../../src/handlers/jump.js';

const AT = 0xffff_f800_1000_0000n;
const GB2 = 2n ** 31n;

describe('encodeJump', () => {
  it('counts from the end of the jump, not of its padding', () => {
    expect(encodeJump(AT, AT + 0x105n, 8)).toEqual(Buffer.from('e900010000909090', 'hex'));
    expect(encodeJump(AT, AT)).toEqual(Buffer.from('e9fbffffff', 'hex'));
  });

  it('reaches 2 GB in both directions, to the byte', () => {
    const end = AT + 5n;
    expect(encodeJump(AT, end + GB2 - 1n)).toEqual(Buffer.from('e9ffffff7f', 'hex'));
    expect(encodeJump(AT, end + GB2)).toBeUndefined();
    expect(encodeJump(AT, end - GB2)).toEqual(Buffer.from('e900000080', 'hex'));
    expect(encodeJump(AT, end - GB2 - 1n)).toBeUndefined();
  });

  it('has the displacement that rel32 gives', () => {
    expect(rel32(AT, AT + GB2 - 1n)).toBe(0x7fff_ffff);
    expect(rel32(AT, AT + GB2)).toBeUndefined();
  });
});

import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type Cloak, CloakMap, MAX_ANSWER } from '../../src/cloak/cloak-map.js';
import { cloaksOfChange } from '../../src/cloak/pieces.js';
import { type Gva, PAGE_SIZE } from '../../src/vmi/address.js';

const RUNS = 300;

/** Memory in which every byte is told apart from its neighbours, with the cloaks' bytes written into it. */
class Memory {
  readonly bytes = Buffer.alloc(4 * PAGE_SIZE);
  readonly read = (gpa: bigint, length: number) => this.bytes.subarray(Number(gpa), Number(gpa) + length);

  constructor(cloaks: readonly Cloak<unknown>[] = []) {
    for (const at of this.bytes.keys()) this.bytes[at] = plainByte(at);
    for (const { gpa, current } of cloaks) this.bytes.set(current, Number(gpa));
  }
}

function plainByte(at: number): number {
  return (at * 7 + (at >> 8)) & 0xff;
}

function plain(gpa: number, length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => plainByte(gpa + i));
}

/** Hides what `plain` has there behind bytes that differ from it everywhere. */
function cloak(gpa: number, length: number, owner = 'site'): Cloak<string> {
  const original = plain(gpa, length);
  return { gpa: BigInt(gpa), original, current: original.map((byte) => byte ^ 0xff), owner };
}

function setUp(...cloaks: Cloak<string>[]) {
  const map = new CloakMap<string>();
  for (const each of cloaks) map.hide(each);
  return { map, memory: new Memory(cloaks) };
}

describe('overlay', () => {
  const hidden = { at: 0x1100, length: 7 };

  it.each([
    ['inside the hidden range', 0x1102, 3],
    ['the hidden range exactly', 0x1100, 7],
    ['around it', 0x10f8, 24],
    ['straddling its start', 0x10fd, 8],
    ['straddling its end', 0x1105, 8],
    ['crossing into its page', 0xff8, 0x110],
    ['crossing out of its page', 0x1103, 0x1000],
  ])('a read of %s sees the original bytes', (_name, gpa, length) => {
    const { map, memory } = setUp(cloak(hidden.at, hidden.length));
    expect(map.overlay(BigInt(gpa), length, memory.read)).toEqual(plain(gpa, length));
  });

  it.each([
    ['before', 0x10f0, 0x10],
    ['behind', 0x1107, 0x10],
  ])('a read just %s a hidden range is not touched by it', (_name, gpa, length) => {
    const { map } = setUp(cloak(hidden.at, hidden.length));
    expect(map.touches(BigInt(gpa), length)).toBe(false);
    expect(map.overlay(BigInt(gpa), length, () => new Uint8Array(length).fill(0xee))).toEqual(
      new Uint8Array(length).fill(0xee),
    );
  });

  it('never changes the memory it was given', () => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    const before = Buffer.from(memory.bytes);
    map.overlay(0x1000n, 0x200, memory.read);
    expect(memory.bytes).toEqual(before);
  });

  it('does not follow later changes of the arrays it was given', () => {
    const own = cloak(0x1100, 7);
    const { map, memory } = setUp(own);
    own.original.fill(0);
    expect(map.overlay(0x1100n, 7, memory.read)).toEqual(plain(0x1100, 7));
  });

  it('any read among any cloaks sees memory as it was', () => {
    const slots = fc.uniqueArray(fc.nat(4 * 128 - 1), { maxLength: 40 });
    const piece = fc.record({ skip: fc.nat(20), length: fc.integer({ min: 1, max: 12 }) });
    fc.assert(
      fc.property(
        slots,
        fc.array(piece, { minLength: 40, maxLength: 40 }),
        fc.nat(4 * PAGE_SIZE - 1),
        fc.nat(600),
        (chosen, pieces, gpa, wanted) => {
          const cloaks = chosen.map((slot, i) => cloak(slot * 32 + pieces[i]!.skip, pieces[i]!.length));
          const { map, memory } = setUp(...cloaks);
          const length = Math.min(wanted, 4 * PAGE_SIZE - gpa);
          expect(map.overlay(BigInt(gpa), length, memory.read)).toEqual(plain(gpa, length));
          const differs = memory.read(BigInt(gpa), length).compare(plain(gpa, length)) !== 0;
          expect(map.touches(BigInt(gpa), length)).toBe(differs);
        },
      ),
      { numRuns: RUNS },
    );
  });
});

describe('answer', () => {
  it('of an access of unknown length covers the longest one', () => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    expect(map.answer(0x1006n, memory.read)).toEqual(plain(0x1006, MAX_ANSWER));
  });

  it('is none when the hidden bytes lie just out of reach', () => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    expect(map.answer(0x1000n, memory.read)).toBeUndefined();
    expect(map.answer(0x10f8n, memory.read, 8)).toBeUndefined();
    expect(map.answer(0x1107n, memory.read)).toBeUndefined();
  });

  it('of an access of known length covers just that', () => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    expect(map.answer(0x10f9n, memory.read, 8)).toEqual(plain(0x10f9, 8));
  });

  it('is never longer than a hypervisor takes', () => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    expect(map.answer(0x1080n, memory.read, 512)).toEqual(plain(0x1080, MAX_ANSWER));
  });

  it('ends with the page: the other piece of a crossing read is an access of its own', () => {
    const { map, memory } = setUp(cloak(0x1ffe, 2), cloak(0x2000, 5));
    expect(map.answer(0x1ffcn, memory.read)).toEqual(plain(0x1ffc, 4));
    expect(map.answer(0x2000n, memory.read, 4)).toEqual(plain(0x2000, 4));
  });

  it('of a read that ends on a page without cloaks leaves that page alone', () => {
    const { map, memory } = setUp(cloak(0x2000, 5));
    expect(map.answer(0x1ffcn, memory.read, 8)).toBeUndefined();
  });
});

describe('hide and reveal', () => {
  it('a frame is trapped from its first cloak to its last', () => {
    const map = new CloakMap<string>();
    map.hide(cloak(0x1100, 7, 'a'));
    map.hide(cloak(0x1107, 7, 'b'));
    map.hide(cloak(0x3000, 7, 'b'));
    expect(map.frames()).toEqual([1n, 3n]);
    map.reveal('b');
    expect(map.frames()).toEqual([1n]);
    map.reveal('b');
    map.reveal('a');
    expect(map.frames()).toEqual([]);
    expect(map.isHidden(0x1100n)).toBe(false);
  });

  it('one owner has all of its own cloaks and no other', () => {
    const { map } = setUp(cloak(0x1100, 7, 'a'), cloak(0x1200, 7, 'b'), cloak(0x3000, 7, 'a'));
    expect(map.cloaksOf('a').map(({ gpa }) => gpa)).toEqual([0x1100n, 0x3000n]);
  });

  it('every byte of a range is hidden, and none beside it', () => {
    const { map } = setUp(cloak(0x1100, 7));
    const hidden = Array.from({ length: PAGE_SIZE }, (_, i) => 0x1000n + BigInt(i)).filter((gpa) =>
      map.isHidden(gpa),
    );
    expect(hidden).toEqual([0x1100n, 0x1101n, 0x1102n, 0x1103n, 0x1104n, 0x1105n, 0x1106n]);
  });

  it.each([
    ['an empty range', { ...cloak(0x1100, 0) }],
    ['a range that crosses a page', cloak(0x1ffc, 7)],
    ['unequal lengths', { ...cloak(0x1100, 7), current: new Uint8Array(6) }],
    ['an overlap with the start of another', cloak(0x10fc, 5)],
    ['an overlap with the end of another', cloak(0x1106, 5)],
  ])('%s is refused and leaves the map as it was', (_name, bad) => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    expect(() => map.hide(bad)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
    expect(map.overlay(0x1000n, 0x2000, memory.read)).toEqual(plain(0x1000, 0x2000));
    expect(map.frames()).toEqual([1n]);
  });

  it('a range over a page end hides two frames that are no neighbours', () => {
    const gva = 0xffff_f800_0000_1ffdn;
    const translate = (at: Gva) => (at === gva ? 0x3ffdn : at === gva + 3n ? 0x1000n : -1n);
    const current = Uint8Array.of(0xe9, 1, 2, 3, 4, 0x90, 0x90);
    const original = Uint8Array.from([...plain(0x3ffd, 3), ...plain(0x1000, 4)]);
    const cloaks = cloaksOfChange({ gva, original, current, owner: 'site' }, translate);
    expect(cloaks.map(({ gpa, current: bytes }) => [gpa, [...bytes]])).toEqual([
      [0x3ffdn, [0xe9, 1, 2]],
      [0x1000n, [3, 4, 0x90, 0x90]],
    ]);
    const { map, memory } = setUp(...cloaks);
    expect(map.frames()).toEqual([3n, 1n]);
    expect(map.overlay(0n, 4 * PAGE_SIZE, memory.read)).toEqual(plain(0, 4 * PAGE_SIZE));
  });

  it('any change is split so that its cloaks, put together, are the change', () => {
    fc.assert(
      fc.property(fc.bigInt(0n, 8191n), fc.uint8Array({ minLength: 1, maxLength: 9000 }), (gva, current) => {
        const original = current.map((byte) => byte ^ 0xff);
        const cloaks = cloaksOfChange({ gva, original, current, owner: 'x' }, (at) => at);
        expect(Buffer.concat(cloaks.map((each) => each.current))).toEqual(Buffer.from(current));
        expect(Buffer.concat(cloaks.map((each) => each.original))).toEqual(Buffer.from(original));
        const map = new CloakMap<string>();
        for (const each of cloaks) map.hide(each);
        expect(map.touches(gva - 1n, 1)).toBe(false);
        expect(map.touches(gva + BigInt(current.length), 1)).toBe(false);
      }),
      { numRuns: 50 },
    );
  });
});

describe('a guest write to hidden bytes', () => {
  const write = (memory: Memory, gpa: number, bytes: number[]) => memory.bytes.set(bytes, gpa);

  it('becomes the original of exactly the written bytes', () => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    write(memory, 0x1102, [0xaa, 0xbb]);
    expect(map.reconcile(0x1102n, memory.read, 2)).toEqual(['site']);
    const expected = plain(0x1100, 7);
    expected.set([0xaa, 0xbb], 2);
    expect(map.overlay(0x1100n, 7, memory.read)).toEqual(expected);
    expect(map.cloaksOf('site')[0]!.original).toEqual(expected);
  });

  it('beside them affects nobody', () => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    write(memory, 0x10fe, [0xaa, 0xbb]);
    expect(map.reconcile(0x10fen, memory.read, 2)).toEqual([]);
  });

  it('over two neighbours affects both owners, each once', () => {
    const { map, memory } = setUp(cloak(0x1100, 4, 'a'), cloak(0x1104, 4, 'b'), cloak(0x1108, 4, 'a'));
    write(memory, 0x1100, Array(12).fill(0x33));
    expect(map.reconcile(0x1100n, memory.read, 12)).toEqual(['a', 'b']);
    expect(map.overlay(0x1100n, 12, memory.read)).toEqual(new Uint8Array(12).fill(0x33));
  });

  it('of a byte that happens to equal the patched one counts too, when the length is known', () => {
    const own = cloak(0x1100, 7);
    const { map, memory } = setUp(own);
    const same = own.current[0]!;
    write(memory, 0x1100, [same, 0xaa]);
    expect(map.reconcile(0x1100n, memory.read, 2)).toEqual(['site']);
    expect([...map.overlay(0x1100n, 2, memory.read)]).toEqual([same, 0xaa]);
  });

  it('of unknown length never makes a patched byte an original', () => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    write(memory, 0x1100, [0xaa]);
    expect(map.reconcile(0x1100n, memory.read)).toEqual(['site']);
    const expected = plain(0x1100, 7);
    expected[0] = 0xaa;
    expect(map.overlay(0x1100n, 7, memory.read)).toEqual(expected);
  });

  it('that did not happen after all affects nobody', () => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    expect(map.reconcile(0x1100n, memory.read, 7)).toEqual([]);
    expect(map.overlay(0x1100n, 7, memory.read)).toEqual(plain(0x1100, 7));
  });

  it('is reported once', () => {
    const { map, memory } = setUp(cloak(0x1100, 7));
    write(memory, 0x1100, [0xaa]);
    expect(map.reconcile(0x1100n, memory.read, 1)).toEqual(['site']);
    expect(map.reconcile(0x1100n, memory.read, 1)).toEqual([]);
  });

  it('stops at the end of the page', () => {
    const { map, memory } = setUp(cloak(0x1ffe, 2, 'a'), cloak(0x2000, 2, 'b'));
    write(memory, 0x1ffe, [1, 2, 3, 4]);
    expect(map.reconcile(0x1ffen, memory.read, 4)).toEqual(['a']);
    expect(map.reconcile(0x2000n, memory.read, 2)).toEqual(['b']);
  });
});

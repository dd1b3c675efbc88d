import type { Gva } from '../vmi/address.js';
import { jumpTo, LEA_RELATIVE_LENGTH, leaIndexed, leaRelative, type Scale } from './encoding.js';
import type { IndexSource } from './evacuation.js';
import { rel32 } from './jump.js';
import type { TableLoad } from './plan.js';

/** How far apart two blocks are. */
export type Stride = 8 | 10 | 11 | 12 | 16;

/** Code that jumps to block number idx; its length is known before its place is. */
export interface ComputedJump {
  readonly length: number;
  /** The code at `at`, with block 0 at `blocks`; `undefined` when something is more than 2 GB away. */
  encode(at: Gva, blocks: Gva): Buffer | undefined;
  /** For each of its instructions, by offset: where idx is before it is executed. */
  indices(blocks: Gva): ReadonlyMap<number, IndexSource>;
}

/** A multiple of idx, as the sum of what one LEA each can add. */
const SUMMANDS: Readonly<Record<Stride, readonly Scale[]>> = {
  8: [8],
  10: [8, 2],
  11: [8, 2, 1],
  12: [8, 4],
  16: [8, 8],
};

/** A multiple of idx as (1 + `first`) * `second`, or as one factor. */
const FACTORS: Readonly<Record<Exclude<Stride, 11>, readonly [...Scale[], Scale]>> = {
  8: [8],
  10: [4, 2],
  12: [2, 4],
  16: [1, 8],
};

/**
 * Computes in dst, with LEA alone, so that no flag, no memory and no other register changes.
 *
 * The address is computed on top of what base holds; where that is not proven, is dst itself, or the stride is 11, on
 * top of RIP, which takes one LEA more and is not possible where dst is idx.
 */
export function computedJump(load: TableLoad, stride: Stride): ComputedJump | undefined {
  return fromBase(load, stride) ?? fromRip(load, stride);
}

/** `lea dst, [rip + blocks]`; `lea dst, [dst + idx*scale]` for each summand; `jmp dst` */
function fromRip({ dst, idx }: TableLoad, stride: Stride): ComputedJump | undefined {
  if (dst === idx) return undefined;
  const additions = SUMMANDS[stride].map((scale) => leaIndexed(dst, dst, idx, scale));
  const rest = [...additions.flat(), ...jumpTo(dst)];
  const unchanged = { register: idx, offset: 0n, factor: 1n };
  return {
    length: LEA_RELATIVE_LENGTH + rest.length,
    encode(at, blocks) {
      const first = leaRelative(dst, at, blocks);
      return first && Buffer.from([...first, ...rest]);
    },
    indices() {
      const lengths = [LEA_RELATIVE_LENGTH, ...additions.map((code) => code.length)];
      return new Map([0, ...ends(lengths)].map((at) => [at, unchanged]));
    },
  };
}

/** `lea dst, [idx + idx*scale]` where there are two factors; `lea dst, [base + dst*scale + (blocks - base)]`; `jmp dst` */
function fromBase({ dst, idx, base, baseValue }: TableLoad, stride: Stride): ComputedJump | undefined {
  if (baseValue === undefined || base === dst || stride === 11) return undefined;
  const factors = FACTORS[stride];
  const first = factors.slice(0, -1).flatMap((scale) => leaIndexed(dst, idx, idx, scale));
  const multiple = first.length === 0 ? idx : dst;
  const code = (displacement: number) =>
    Buffer.from([
      ...first,
      ...leaIndexed(dst, base, multiple, factors.at(-1)!, displacement),
      ...jumpTo(dst),
    ]);
  return {
    length: code(0).length,
    encode(_, blocks) {
      const displacement = rel32(baseValue, blocks);
      return displacement === undefined ? undefined : code(displacement);
    },
    indices(blocks) {
      const unchanged = { register: idx, offset: 0n, factor: 1n };
      const multiplied = { register: dst, offset: 0n, factor: BigInt(stride / factors.at(-1)!) };
      const placed = { register: dst, offset: blocks, factor: BigInt(stride) };
      const jmp = code(0).length - jumpTo(dst).length;
      return new Map<number, IndexSource>([
        [0, unchanged],
        ...(first.length === 0 ? [] : [[first.length, multiplied] as const]),
        [jmp, placed],
      ]);
    },
  };
}

/** Where each of some pieces ends, one behind the other. */
function ends(lengths: readonly number[]): number[] {
  let end = 0;
  return lengths.map((length) => {
    end += length;
    return end;
  });
}

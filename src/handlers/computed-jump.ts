import type { Gva } from '../vmi/address.js';
import type { GprName } from '../x86/registers.js';
import { jumpTo, LEA_RELATIVE_LENGTH, leaIndexed, leaMultiple, leaRelative, type Scale } from './encoding.js';
import type { IndexSource } from './evacuation.js';
import { rel32 } from './jump.js';

/** How far apart two blocks are. */
export type Stride = 2 | 5 | 8 | 10 | 11 | 12 | 16 | 18 | 20;

/** The registers of a computed jump. */
export interface JumpRegisters {
  /** Overwritten by the block's address. */
  readonly address: GprName;
  readonly idx: GprName;
  /** Holds `baseValue`. */
  readonly base: GprName;
  readonly baseValue: Gva;
}

/** One of its instructions, and where idx is before it is executed. */
export interface JumpStep {
  readonly code: readonly number[];
  readonly index: IndexSource;
}

/** Code that jumps to block number idx; its length is known before its place is. */
export interface ComputedJump {
  readonly length: number;
  /** The code at `at`, with block 0 at `blocks`; `undefined` when something is more than 2 GB away. */
  steps(at: Gva, blocks: Gva): readonly JumpStep[] | undefined;
}

/** A multiple of idx, as the sum of what one LEA each can add. */
const SUMMANDS: Readonly<Record<Stride, readonly Scale[]>> = {
  2: [2],
  5: [4, 1],
  8: [8],
  10: [8, 2],
  11: [8, 2, 1],
  12: [8, 4],
  16: [8, 8],
  18: [8, 8, 2],
  20: [8, 8, 4],
};

/** A multiple of idx as (1 + `first`) * `second`, or as one factor. */
const FACTORS: Readonly<Record<Exclude<Stride, 11>, readonly [...Scale[], Scale]>> = {
  2: [2],
  5: [4, 1],
  8: [8],
  10: [4, 2],
  12: [2, 4],
  16: [1, 8],
  18: [8, 2],
  20: [4, 4],
};

/**
 * Computes in `address`, with LEA alone, so that no flag, no memory and no other register changes.
 *
 * The address is computed on top of what base holds; where that is the same register, or the stride is 11, on top of
 * RIP, which takes one LEA more and is not possible where `address` is idx.
 */
export function computedJump(registers: JumpRegisters, stride: Stride): ComputedJump | undefined {
  return fromBase(registers, stride) ?? fromRip(registers, stride);
}

/** `lea address, [rip + blocks]`; `lea address, [address + idx*scale]` for each summand; `jmp address` */
function fromRip({ address, idx }: JumpRegisters, stride: Stride): ComputedJump | undefined {
  if (address === idx) return undefined;
  const additions = SUMMANDS[stride].map((scale) => leaIndexed(address, address, idx, scale));
  const rest = [...additions, jumpTo(address)];
  return {
    length: LEA_RELATIVE_LENGTH + rest.flat().length,
    steps(at, blocks) {
      const first = leaRelative(address, at, blocks);
      return first && [first, ...rest].map((code) => ({ code, index: itself(idx) }));
    },
  };
}

/**
 * `lea address32, [idx + idx*scale]` where there are two factors;
 * `lea address, [base + address*scale + (blocks - base)]`; `jmp address`
 */
function fromBase(
  { address, idx, base, baseValue }: JumpRegisters,
  stride: Stride,
): ComputedJump | undefined {
  if (base === address || stride === 11) return undefined;
  const factors = FACTORS[stride];
  const last = factors.at(-1)!;
  // An index is so small that no bit of its multiple is lost in 32.
  const first = factors.slice(0, -1).map((scale) => leaMultiple(address, idx, scale));
  const multiple = first.length === 0 ? idx : address;
  const add = (displacement: number) => leaIndexed(address, base, multiple, last, displacement);
  return {
    length: [...first.flat(), ...add(0), ...jumpTo(address)].length,
    steps(_, blocks) {
      const displacement = rel32(baseValue, blocks);
      if (displacement === undefined) return undefined;
      const multiplied = { register: address, offset: 0n, factor: BigInt(stride / last) };
      const placed = { register: address, offset: blocks, factor: BigInt(stride) };
      const where = (overwritten: IndexSource) => (address === idx ? overwritten : itself(idx));
      return [
        ...first.map((code) => ({ code, index: itself(idx) })),
        { code: add(displacement), index: first.length === 0 ? itself(idx) : where(multiplied) },
        { code: jumpTo(address), index: where(placed) },
      ];
    },
  };
}

function itself(idx: GprName): IndexSource {
  return { register: idx, offset: 0n, factor: 1n };
}

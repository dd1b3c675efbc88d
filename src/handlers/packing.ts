import type { Gva } from '../vmi/address.js';
import type { Stride } from './computed-jump.js';
import type { Exit } from './evacuation.js';
import type { HandlerCode } from './handler-code.js';
import { JUMP_LENGTH, SHORT_JUMP_LENGTH } from './jump.js';
import type { Outcome, Replaced } from './replaced.js';

/** How the blocks of a handler stand. */
export interface Packing {
  readonly stride: Stride;
  /** Block 0 stands at a multiple of it; 1 where nothing is gained by more. */
  readonly alignment: number;
  /** Bytes in front of block 0. */
  readonly front: number;
  /** Bytes from block 0 on. */
  readonly size: number;
  write(code: HandlerCode, blocks: Gva): void;
}

/** As much as a processor fetches at once. */
const FETCHED = 16;
const TIGHT_STRIDE = 8;
const SHORT_JUMP_REACH = 127;
/** Blocks from which a short jump reaches the shared jump in front of the first, and the one behind the last. */
const REACHING_FRONT = 15;
const REACHING_REAR = 16;
export const MOST_TIGHT = REACHING_FRONT + REACHING_REAR;

/** Each block does all that is to be done; `undefined` when one does not fit. */
export function spaced({ outcomes, site }: Replaced, stride: Stride): Packing | undefined {
  const lengths = outcomes.map(lengthOf);
  if (Math.max(...lengths) > stride) return undefined;
  return {
    stride,
    // No block crosses a boundary of what is fetched at once; for short ones that makes no difference.
    alignment: stride % FETCHED === 0 ? FETCHED : 1,
    front: 0,
    size: (outcomes.length - 1) * stride + lengths.at(-1)!,
    write(code, blocks) {
      for (const [index, outcome] of outcomes.entries()) {
        writeOutcome(code, blocks + BigInt(index * stride), outcome, { rip: site.gva, index });
      }
    },
  };
}

/** The same where a processor likes it best; nearly without a gap, where there is nothing to do but to go on, or much. */
export function roomy(replaced: Replaced): Packing | undefined {
  return spaced(replaced, 8) ?? spaced(replaced, 16) ?? spaced(replaced, 18) ?? spaced(replaced, 20);
}

/** Blocks of one instruction and a short jump to a shared jump back; `undefined` where not each reaches one. */
export function tight({ outcomes, site }: Replaced): Packing | undefined {
  const count = outcomes.length;
  const { leadsTo } = outcomes[0]!;
  if (count > MOST_TIGHT) return undefined;
  const front = count > REACHING_REAR ? JUMP_LENGTH : 0;
  const rear = count * TIGHT_STRIDE;
  const done = { rip: leadsTo };
  return {
    stride: TIGHT_STRIDE,
    alignment: 1,
    front,
    size: rear + JUMP_LENGTH,
    write(code, blocks) {
      const [fromFront, fromRear] = [blocks - BigInt(front), blocks + BigInt(rear)];
      if (front > 0) code.jump(fromFront, leadsTo, done);
      code.jump(fromRear, leadsTo, done);
      for (const [index, outcome] of outcomes.entries()) {
        const exit = { rip: site.gva, index };
        const jumpAt = code.put(blocks + BigInt(index * TIGHT_STRIDE), outcome.code[0], exit);
        code.shortJump(jumpAt, count - index <= REACHING_REAR ? fromRear : fromFront, exit);
      }
    },
  };
}

/**
 * For each index a jump to a block behind all of these jumps: one for all indices with the same outcome. A byte table
 * has many indices, but few outcomes. Where there is nothing to do but to go on, a near jump does that itself.
 *
 * @param stride that of the jumps; short ones, where it is 2: `undefined` where not each reaches its block
 */
export function shared({ outcomes, site }: Replaced, stride: 2 | 5 | 8): Packing | undefined {
  const isShort = stride === SHORT_JUMP_LENGTH;
  const { blockOf, blocks: distinct } = share(outcomes, ({ code }) => isShort || code.length > 0);
  const offsets: number[] = [];
  let size = outcomes.length * stride;
  for (const { outcome } of distinct) {
    offsets.push(size);
    size += lengthOf(outcome);
  }
  const reaches = blockOf.every(
    (block, index) => block === undefined || offsets[block]! - (index + 1) * stride <= SHORT_JUMP_REACH,
  );
  if (isShort && !reaches) return undefined;
  return {
    stride,
    alignment: 1,
    front: 0,
    size,
    write(code, blocks) {
      for (const [index, outcome] of outcomes.entries()) {
        const at = blocks + BigInt(index * stride);
        const block = blockOf[index];
        const target = block === undefined ? outcome.leadsTo : blocks + BigInt(offsets[block]!);
        const exit = { rip: site.gva, index };
        if (isShort) code.shortJump(at, target, exit);
        else code.jump(at, target, exit);
      }
      for (const [block, { outcome, index }] of distinct.entries()) {
        // Any index that leads here does the same.
        writeOutcome(code, blocks + BigInt(offsets[block]!), outcome, { rip: site.gva, index });
      }
    },
  };
}

interface SharedBlocks {
  /** By index: the number of its block; `undefined` where it needs none. */
  readonly blockOf: readonly (number | undefined)[];
  readonly blocks: readonly { readonly outcome: Outcome; readonly index: number }[];
}

/** The block of an early index, which is farthest away, comes first. */
function share(outcomes: readonly Outcome[], needsBlock: (outcome: Outcome) => boolean): SharedBlocks {
  const numbers = new Map<string, number>();
  const blocks: { outcome: Outcome; index: number }[] = [];
  const blockOf = outcomes.map((outcome, index) => {
    if (!needsBlock(outcome)) return undefined;
    const key = `${outcome.leadsTo} ${outcome.code.flat()}`;
    const known = numbers.get(key);
    if (known !== undefined) return known;
    numbers.set(key, blocks.length);
    return blocks.push({ outcome, index }) - 1;
  });
  return { blockOf, blocks };
}

function lengthOf({ code }: Outcome): number {
  return code.reduce((length, instruction) => length + instruction.length, JUMP_LENGTH);
}

function writeOutcome(code: HandlerCode, start: Gva, outcome: Outcome, exit: Exit): void {
  let at = start;
  for (const instruction of outcome.code) at = code.put(at, instruction, exit);
  code.jump(at, outcome.leadsTo, exit);
}

import type { Gva } from '../vmi/address.js';
import type { ComputedJump, Stride } from './computed-jump.js';
import { INT3 } from './encoding.js';
import { type Exit, StacklessEvacuation } from './evacuation.js';
import { encodeJump, JUMP_LENGTH } from './jump.js';
import type { HandlerLayout, TableLoad } from './plan.js';

/** An instruction of a block. */
export interface BlockStep {
  readonly code: readonly number[];
  /** How to do it, and what comes after it, without the handler. */
  readonly exit: Exit;
}

/** What the block of an entry does, and where it jumps to then. The steps have the same lengths for all. */
export interface Block {
  readonly steps: readonly BlockStep[];
  readonly leadsTo: Gva;
}

/** As much as a processor fetches at once. */
const ALIGNMENT = 16n;

/**
 * A computed jump to one of the blocks, which stand `stride` bytes apart; where that is a multiple of 16, no block
 * crosses a boundary of 16 bytes.
 */
export function stridedLayout(
  load: TableLoad,
  jump: ComputedJump,
  stride: Stride,
  entries: Uint32Array,
  blocks: readonly Block[],
): HandlerLayout {
  const blockLength = sum(blocks[0]!.steps.map(({ code }) => code.length)) + JUMP_LENGTH;
  if (blockLength > stride) throw new RangeError(`blocks of ${blockLength} bytes do not fit ${stride}`);
  const isAligned = BigInt(stride) % ALIGNMENT === 0n;
  const padding = isAligned ? Number(ALIGNMENT) - 1 : 0;
  const size = padding + jump.length + (blocks.length - 1) * stride + blockLength;
  return {
    size,
    replaces: [load.gva],
    at(handler) {
      const end = handler + BigInt(jump.length);
      const first = isAligned ? alignUp(end) : end;
      const start = first - BigInt(jump.length);
      const firstAt = Number(first - handler);
      const bytes = Buffer.alloc(size, INT3);
      const header = jump.encode(start, first);
      const site = encodeJump(load.gva, start, load.length);
      if (header === undefined || site === undefined) return { refused: 'jump-out-of-range' };
      bytes.set(header, firstAt - jump.length);
      const exits = headerExits(load, jump, start, first);
      for (const [k, { steps, leadsTo }] of blocks.entries()) {
        let at = firstAt + k * stride;
        for (const { code, exit } of steps) {
          exits.set(handler + BigInt(at), exit);
          bytes.set(code, at);
          at += code.length;
        }
        const leave = encodeJump(handler + BigInt(at), leadsTo);
        if (leave === undefined) return { refused: 'jump-out-of-range' };
        exits.set(handler + BigInt(at), { rip: leadsTo });
        bytes.set(leave, at);
      }
      return {
        handler: { gva: handler, bytes },
        site: { gva: load.gva, bytes: site },
        interior: [],
        blocks: firstAt,
        evacuation: new StacklessEvacuation(load.dst, entries, exits),
      };
    },
  };
}

/** While the block's address is computed, the load still has to be done. */
export function headerExits(load: TableLoad, jump: ComputedJump, start: Gva, blocks: Gva): Map<Gva, Exit> {
  const rip = load.gva + BigInt(load.length);
  return new Map([...jump.indices(blocks)].map(([at, entry]) => [start + BigInt(at), { rip, entry }]));
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, number) => total + number, 0);
}

function alignUp(gva: Gva): Gva {
  return (gva + ALIGNMENT - 1n) & ~(ALIGNMENT - 1n);
}

import type { Gva } from '../vmi/address.js';
import type { ComputedJump, Stride } from './computed-jump.js';
import { INT3 } from './encoding.js';
import { encodeJump, JUMP_LENGTH } from './jump.js';
import type { HandlerLayout, TableLoad } from './plan.js';

/** What the block of an entry does, and where it jumps to then. The code has the same length for all. */
export interface Block {
  readonly code: readonly number[];
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
  blocks: readonly Block[],
): HandlerLayout {
  const blockLength = blocks[0]!.code.length + JUMP_LENGTH;
  const isAligned = BigInt(stride) % ALIGNMENT === 0n;
  const padding = isAligned ? Number(ALIGNMENT) - 1 : 0;
  const size = padding + jump.length + (blocks.length - 1) * stride + blockLength;
  return {
    size,
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
      for (const [k, { code, leadsTo }] of blocks.entries()) {
        const at = firstAt + k * stride;
        const jumpAt = at + code.length;
        const leave = encodeJump(handler + BigInt(jumpAt), leadsTo);
        if (leave === undefined) return { refused: 'jump-out-of-range' };
        bytes.set(code, at);
        bytes.set(leave, jumpAt);
      }
      return {
        handler: { gva: handler, bytes },
        site: { gva: load.gva, bytes: site },
        blocks: firstAt,
      };
    },
  };
}

function alignUp(gva: Gva): Gva {
  return (gva + ALIGNMENT - 1n) & ~(ALIGNMENT - 1n);
}

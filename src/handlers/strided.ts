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

/** A computed jump to one of the blocks, which stand `stride` bytes apart. */
export function stridedLayout(
  load: TableLoad,
  jump: ComputedJump,
  stride: Stride,
  blocks: readonly Block[],
): HandlerLayout {
  const blockLength = blocks[0]!.code.length + JUMP_LENGTH;
  const size = jump.length + (blocks.length - 1) * stride + blockLength;
  return {
    size,
    at(handler) {
      const first = handler + BigInt(jump.length);
      const bytes = Buffer.alloc(size, INT3);
      const header = jump.encode(handler, first);
      const site = encodeJump(load.gva, handler, load.length);
      if (header === undefined || site === undefined) return { refused: 'jump-out-of-range' };
      bytes.set(header);
      for (const [k, { code, leadsTo }] of blocks.entries()) {
        const at = jump.length + k * stride;
        const jumpAt = at + code.length;
        const leave = encodeJump(handler + BigInt(jumpAt), leadsTo);
        if (leave === undefined) return { refused: 'jump-out-of-range' };
        bytes.set(code, at);
        bytes.set(leave, jumpAt);
      }
      return {
        handler: { gva: handler, bytes },
        site: { gva: load.gva, bytes: site },
        blocks: jump.length,
      };
    },
  };
}

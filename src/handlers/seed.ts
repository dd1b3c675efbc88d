import type { Gva } from '../vmi/address.js';
import type { GprName } from '../x86/registers.js';
import { encoding, rex, rexW, u32 } from './encoding.js';
import { NoEvacuation } from './evacuation.js';
import { encodeJump, JUMP_LENGTH } from './jump.js';
import type { HandlerLayout, LoadSite, Refused } from './plan.js';
import { type LoadRefusal, refusalOf } from './refusal.js';

/** Bytes in front of the first block, for every choice of registers. */
export const SEED_HEADER_SIZE = 47;
/** `mov dst, imm32` and `jmp back`, for every choice of registers. */
export const SEED_BLOCK_SIZE = 11;
/** As many as the layout's documentation allows. */
export const SEED_MOST_ENTRIES = 256;
/** What the handler overwrites below RSP: the saved flags, the target, the saved index. */
export const SEED_STACK_BYTES = 24;

/**
 * Lays out the handler of `load`: for every index k below `entries.length` it leaves the registers,
 * flags and RIP that the load would have left after reading `entries[k]`.
 *
 * An index out of range leads anywhere: the caller has proven the bound. The load may be of one byte too
 * (`movzx r32, byte [...]`), with the table's bytes as entries.
 */
export function seedLayout(load: LoadSite, entries: ArrayLike<number>): HandlerLayout | Refused<LoadRefusal> {
  const refused = refusalOf(load, entries.length, SEED_MOST_ENTRIES);
  if (refused !== undefined) return { refused };
  const back = load.gva + BigInt(load.length);
  const size = SEED_HEADER_SIZE + entries.length * SEED_BLOCK_SIZE;
  return {
    size,
    replaces: [load.gva],
    at(handler) {
      const site = encodeJump(load.gva, handler, load.length);
      const blocks = encodeBlocks(load.dst, entries, handler + BigInt(SEED_HEADER_SIZE), back);
      if (site === undefined || blocks === undefined) return { refused: 'jump-out-of-range' };
      return {
        handler: { gva: handler, bytes: Buffer.concat([encodeHeader(load, handler), blocks]) },
        site: { gva: load.gva, bytes: site },
        interior: [],
        blocks: SEED_HEADER_SIZE,
        evacuation: new NoEvacuation({ gva: handler, size }),
      };
    },
  };
}

/**
 * Computes the block's address on the stack, so that no register but dst is changed and none is needed.
 * A REX prefix stands everywhere, even where it says nothing: the size is the same for all registers.
 */
export function encodeHeader(load: LoadSite, handler: Gva): Buffer {
  const dst = encoding(load.dst);
  const idx = encoding(load.idx);
  const blocks = handler + BigInt(SEED_HEADER_SIZE);
  return Buffer.from([
    0x9c, // pushfq
    rexW({ b: dst.high }),
    0x50 | dst.low, // push dst
    rexW({ b: idx.high }),
    0x50 | idx.low, // push idx
    ...[0xc7, 0x44, 0x24, 0x08, ...u32(blocks)], // mov dword [rsp+8], low half of blocks
    ...[0xc7, 0x44, 0x24, 0x0c, ...u32(blocks >> 32n)], // mov dword [rsp+12], high half
    rexW({ r: idx.high, b: idx.high }),
    ...[0x6b, 0xc0 | (idx.low << 3) | idx.low, SEED_BLOCK_SIZE], // imul idx, idx, 11
    rexW({ r: idx.high }),
    ...[0x01, 0x44 | (idx.low << 3), 0x24, 0x08], // add [rsp+8], idx
    rexW({ b: idx.high }),
    0x58 | idx.low, // pop idx
    rexW({ b: dst.high }),
    0x58 | dst.low, // pop dst
    // No pointer into the handler may stay below RSP, where a thread scan would take it for a live one.
    ...[0x48, 0xc7, 0x44, 0x24, 0xf8, 0x00, 0x00, 0x00, 0x00], // mov qword [rsp-8], 0
    0x9d, // popfq
    rex({ b: dst.high }),
    ...[0xff, 0xe0 | dst.low], // jmp dst
  ]);
}

function encodeBlocks(
  dstName: GprName,
  entries: ArrayLike<number>,
  first: Gva,
  back: Gva,
): Buffer | undefined {
  const dst = encoding(dstName);
  const bytes = Buffer.alloc(entries.length * SEED_BLOCK_SIZE);
  for (const [k, entry] of Array.from(entries).entries()) {
    const at = k * SEED_BLOCK_SIZE;
    const jumpAt = at + SEED_BLOCK_SIZE - JUMP_LENGTH;
    const jump = encodeJump(first + BigInt(jumpAt), back);
    if (jump === undefined) return undefined;
    bytes.writeUInt8(rex({ b: dst.high }), at);
    bytes.writeUInt8(0xb8 | dst.low, at + 1); // mov dst, imm32
    bytes.writeUInt32LE(entry, at + 2);
    bytes.set(jump, jumpAt);
  }
  return bytes;
}

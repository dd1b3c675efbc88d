import type { Gva } from '../vmi/address.js';
import { u32 } from './encoding.js';

/** Leads from a return address, as the frame of an interrupt holds it, to a handler. */
export interface Pair {
  readonly returnTo: Gva;
  readonly handler: Gva;
}

export const PAIR_SIZE = 16;

/** The table: for each bucket the offset of its first pair, which is where the one before ends; the chain; the pairs. */
const BUCKETS = 64;
const OFFSET_SIZE = 2;
const CHAIN_AT = 136;
export const PAIRS_AT = 144;

/** In place of a return address: not canonical, so that no frame holds it. */
const REMOVED = 1n << 63n;

export const IRETQ = [0x48, 0xcf];
/** `pop rdx; pop rcx; pop rax` */
export const RESTORE = [0x5a, 0x59, 0x58];

/** The pairs in the order that the table has them in. */
export function inBuckets<Entry extends Pair>(pairs: readonly Entry[]): Entry[] {
  return pairs.toSorted((a, b) => bucketOf(a) - bucketOf(b));
}

/** @param pairs in the order of their buckets; at most 256 */
export function encodeTable(pairs: readonly Pair[], chain = 0n): Buffer {
  const bytes = Buffer.alloc(PAIRS_AT);
  for (let bucket = 0; bucket <= BUCKETS; bucket++) {
    const before = pairs.filter((pair) => bucketOf(pair) < bucket).length;
    bytes.writeUInt16LE(PAIRS_AT + before * PAIR_SIZE, bucket * OFFSET_SIZE);
  }
  bytes.writeBigUInt64LE(chain, CHAIN_AT);
  return Buffer.concat([bytes, ...pairs.map(encodePair)]);
}

/** What stands in the table where a pair is taken out: a thread that is looking through it is not disturbed. */
export function encodeRemovedPair(): Buffer {
  return encodePair({ returnTo: REMOVED, handler: 0n });
}

function encodePair({ returnTo, handler }: Pair): Buffer {
  const bytes = Buffer.alloc(PAIR_SIZE);
  bytes.writeBigUInt64LE(returnTo);
  bytes.writeBigUInt64LE(handler, 8);
  return bytes;
}

function bucketOf({ returnTo }: Pair): number {
  return Number(returnTo % BigInt(BUCKETS));
}

/**
 * The code at `at` that an interrupt enters: it enters the handler of the return address in turn, with rax, rcx and rdx
 * pushed. Where there is none it restores them and goes on at the table's chain, or returns if it has none.
 *
 * Flags are free: IRETQ restores those of the frame. Once the registers are restored, all that is left to jump through
 * is memory that an interrupt may overwrite, or RET, which a shadow stack forbids: so handlers `RESTORE` them.
 */
export function encodeDispatcher(at: Gva, table: Gva, hasChain: boolean): Buffer {
  const begin = [
    ...[0x50, 0x51, 0x52], // push rax; push rcx; push rdx
    ...[0x8b, 0x44, 0x24, 0x18], // mov eax, [rsp+24]: the return address
    ...[0x83, 0xe0, BUCKETS - 1], // and eax, 63
  ];
  const lea = [0x48, 0x8d, 0x15]; // lea rdx, [rip + table]
  const search = [
    ...[0x0f, 0xb7, 0x0c, 0x42], // movzx ecx, word [rdx + rax*2]
    ...[0x0f, 0xb7, 0x44, 0x42, OFFSET_SIZE], // movzx eax, word [rdx + rax*2 + 2]
    ...[0x48, 0x01, 0xd1], // add rcx, rdx: the bucket's first pair
    ...[0x48, 0x01, 0xc2], // add rdx, rax: behind its last
    ...[0x48, 0x8b, 0x44, 0x24, 0x18], // mov rax, [rsp+24]
    ...[0x48, 0x39, 0xd1], // next: cmp rcx, rdx
    ...[0x74, 0x0d], // je none
    ...[0x48, 0x83, 0xc1, PAIR_SIZE], // add rcx, 16
    ...[0x48, 0x3b, 0x41, 0xf0], // cmp rax, [rcx-16]
    ...[0x75, 0xf1], // jne next
    ...[0xff, 0x61, 0xf8], // jmp [rcx-8]
    ...RESTORE, // none:
  ];
  const code = [...begin, ...relative(lea, at + BigInt(begin.length), table), ...search];
  const jump = [0xff, 0x25]; // jmp [rip + chain]
  const end = hasChain ? relative(jump, at + BigInt(code.length), table + BigInt(CHAIN_AT)) : IRETQ;
  return Buffer.from([...code, ...end]);
}

/** An instruction at `at` that ends in the displacement to `target`, which is near. */
function relative(opcode: readonly number[], at: Gva, target: Gva): number[] {
  return [...opcode, ...u32(target - (at + BigInt(opcode.length + 4)))];
}

import { type ComputedJump, computedJump, type Stride } from './computed-jump.js';
import { INT3, movImmediate } from './encoding.js';
import { StacklessEvacuation } from './evacuation.js';
import { encodeJump, JUMP_LENGTH } from './jump.js';
import type { HandlerLayout, Refused, TableLoad } from './plan.js';
import { type LoadRefusal, refusalOf } from './refusal.js';
import { headerExits, stridedLayout } from './strided.js';

/**
 * How the blocks stand: `roomy` 16 bytes apart; `dense` without a gap, or nearly; `tight` 8 bytes apart, with a short
 * jump to a shared one. The fastest first.
 */
export const LEAN_PACKINGS = ['roomy', 'dense', 'tight'] as const;
export type LeanPacking = (typeof LEAN_PACKINGS)[number];

export type LeanRefusal =
  | LoadRefusal
  /** dst is idx, and no other register is known to hold an address. */
  | 'no-register-for-address'
  /** No shared jump is in reach of every block. */
  | 'too-many-entries-for-short-jumps';

const ROOMY_STRIDE = 16;
const TIGHT_STRIDE = 8;
const JMP_REL8 = 0xeb;
const SHORT_JUMP_LENGTH = 2;
/** Blocks from which a short jump reaches the shared jump in front of the first, and the one behind the last. */
const REACHING_FRONT = 15;
const REACHING_REAR = 16;

/**
 * Lays out the handler of `load` that needs no stack: for every index k below `entries.length` it leaves the
 * registers, flags and RIP that the load would have left after reading `entries[k]`, and touches no memory.
 *
 * An index out of range leads anywhere: the caller has proven the bound.
 */
export function leanLayout(
  load: TableLoad,
  entries: Uint32Array,
  packing: LeanPacking,
): HandlerLayout | Refused<LeanRefusal> {
  const refused = refusalOf(load, entries.length);
  if (refused !== undefined) return { refused };
  if (packing === 'tight' && entries.length > REACHING_FRONT + REACHING_REAR) {
    return { refused: 'too-many-entries-for-short-jumps' };
  }
  const codes = Array.from(entries, (entry) => movImmediate(load.dst, entry));
  const stride = strideOf(load, packing, codes[0]!.length + JUMP_LENGTH);
  const jump = computedJump(load, stride);
  if (jump === undefined) return { refused: 'no-register-for-address' };
  if (packing === 'tight') return tightLayout(load, jump, entries, codes);
  const leadsTo = load.gva + BigInt(load.length);
  const blocks = codes.map((code, k) => ({
    steps: [{ code, exit: { rip: leadsTo, entry: entries[k]! } }],
    leadsTo,
  }));
  return stridedLayout(load, jump, stride, entries, blocks);
}

function strideOf({ dst, idx }: TableLoad, packing: LeanPacking, blockLength: number): Stride {
  if (packing === 'roomy') return ROOMY_STRIDE;
  if (packing === 'tight') return TIGHT_STRIDE;
  if (blockLength === 10) return 10;
  // 11 is no product of what one LEA can multiply by.
  return dst === idx ? 12 : 11;
}

function tightLayout(
  load: TableLoad,
  jump: ComputedJump,
  entries: Uint32Array,
  codes: readonly number[][],
): HandlerLayout {
  const front = codes.length > REACHING_REAR ? JUMP_LENGTH : 0;
  const blocks = jump.length + front;
  const rear = blocks + codes.length * TIGHT_STRIDE;
  const size = rear + JUMP_LENGTH;
  const back = load.gva + BigInt(load.length);
  return {
    size,
    replaces: [load.gva],
    at(handler) {
      const header = jump.encode(handler, handler + BigInt(blocks));
      const site = encodeJump(load.gva, handler, load.length);
      const [fromFront, fromRear] = [jump.length, rear].map((at) => encodeJump(handler + BigInt(at), back));
      if (!header || !site || !fromFront || !fromRear) return { refused: 'jump-out-of-range' };
      const bytes = Buffer.alloc(size, INT3);
      bytes.set(header);
      if (front > 0) bytes.set(fromFront, jump.length);
      bytes.set(fromRear, rear);
      const exits = headerExits(load, jump, handler, handler + BigInt(blocks));
      const done = { rip: back };
      for (const at of front > 0 ? [jump.length, rear] : [rear]) exits.set(handler + BigInt(at), done);
      for (const [k, code] of codes.entries()) {
        const jumpAt = blocks + k * TIGHT_STRIDE + code.length;
        const reachesRear = codes.length - k <= REACHING_REAR;
        exits.set(handler + BigInt(jumpAt - code.length), { rip: back, entry: entries[k]! });
        exits.set(handler + BigInt(jumpAt), done);
        bytes.set(code, jumpAt - code.length);
        bytes.writeUInt8(JMP_REL8, jumpAt);
        bytes.writeInt8((reachesRear ? rear : jump.length) - (jumpAt + SHORT_JUMP_LENGTH), jumpAt + 1);
      }
      return {
        handler: { gva: handler, bytes },
        site: { gva: load.gva, bytes: site },
        interior: [],
        blocks,
        evacuation: new StacklessEvacuation(load.dst, entries, exits),
      };
    },
  };
}

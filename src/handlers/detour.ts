import type { Gva } from '../vmi/address.js';
import { type ComputedJump, computedJump, type Stride } from './computed-jump.js';
import { compareTo, JUMP_IF_ABOVE_LENGTH, jumpIfAbove } from './encoding.js';
import { StacklessEvacuation } from './evacuation.js';
import { HandlerCode } from './handler-code.js';
import { encodeJump, JUMP_LENGTH } from './jump.js';
import type { Packing } from './packing.js';
import type { HandlerLayout, Refused } from './plan.js';
import type { Replaced } from './replaced.js';

/** What bounds the index of a handler by itself. */
interface Guard {
  /** Compares the index with the last one that is known. */
  readonly compare: readonly number[];
  /** The original load, for an index beyond. */
  readonly load: readonly number[];
}

/** The shortest code that jumps to a block; `undefined` where no register can hold an address. */
export function jumpToBlock(
  { site: { idx, baseValue }, base, outputs }: Replaced,
  stride: Stride,
): ComputedJump | undefined {
  return outputs
    .map((address) => computedJump({ address, idx, base, baseValue }, stride))
    .filter((jump) => jump !== undefined)
    .sort((a, b) => a.length - b.length)[0];
}

/**
 * Lays out a handler of which all but a jump to it stands in slack: a computed jump, and the blocks it leads to.
 *
 * An index out of range leads anywhere: the caller has proven the bound.
 */
export function detour(
  replaced: Replaced,
  packing: Packing,
): HandlerLayout | Refused<'no-register-for-address'> {
  return layOut(replaced, packing, undefined);
}

/**
 * The same for a bound that is not proven: an index beyond it goes to a copy of the load.
 *
 * @param load the load, which reads the same wherever it stands
 */
export function guardedDetour(
  replaced: Replaced,
  packing: Packing,
  load: readonly number[],
): HandlerLayout | Refused<'no-register-for-address'> {
  const { site, outcomes } = replaced;
  return layOut(replaced, packing, { compare: compareTo(site.idx, outcomes.length - 1), load });
}

function layOut(
  replaced: Replaced,
  packing: Packing,
  guard: Guard | undefined,
): HandlerLayout | Refused<'no-register-for-address'> {
  const jump = jumpToBlock(replaced, packing.stride);
  if (jump === undefined) return { refused: 'no-register-for-address' };
  const { site, loads, outcomes, overwritten } = replaced;
  const guardLength = guard === undefined ? 0 : guard.compare.length + JUMP_IF_ABOVE_LENGTH;
  const fallbackLength = guard === undefined ? 0 : guard.load.length + JUMP_LENGTH;
  const header = guardLength + jump.length + packing.front;
  const size = packing.alignment - 1 + header + packing.size + fallbackLength;
  return {
    size,
    // Beyond the bound, a second load is still executed.
    replaces: guard === undefined ? loads : [site.gva],
    at(handler) {
      const blocks = alignUp(handler + BigInt(header), BigInt(packing.alignment));
      const start = blocks - BigInt(header);
      const code = new HandlerCode(handler, size);
      const again = { rip: site.gva };

      let at = start;
      const fallback = guard && blocks + BigInt(packing.size);
      if (fallback !== undefined) {
        at = code.put(at, guard!.compare, again);
        at = code.put(at, jumpIfAbove(at, fallback), again);
        const back = site.gva + BigInt(site.length);
        const loaded = code.put(fallback, guard!.load, again);
        code.jump(loaded, back, { rip: back });
      }
      const steps = jump.steps(at, blocks);
      for (const { code: instruction, index } of steps ?? []) {
        at = code.put(at, instruction, { rip: site.gva, index });
      }
      packing.write(code, blocks);

      const jumpIn = encodeJump(site.gva, start, site.length);
      const bytes = code.bytes;
      if (steps === undefined || jumpIn === undefined || bytes === undefined) {
        return { refused: 'jump-out-of-range' };
      }
      return {
        handler: { gva: handler, bytes },
        site: { gva: site.gva, bytes: jumpIn },
        interior: [],
        blocks: Number(blocks - handler),
        ...(fallback !== undefined && { fallback }),
        evacuation: new StacklessEvacuation(overwritten, outcomes.length, code.exits),
      };
    },
  };
}

export function alignUp(gva: Gva, alignment: bigint): Gva {
  return ((gva + alignment - 1n) / alignment) * alignment;
}

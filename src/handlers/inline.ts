import type { Gva } from '../vmi/address.js';
import { alignUp, jumpToBlock } from './detour.js';
import { type Exit, StacklessEvacuation } from './evacuation.js';
import { packSwitch, type SwitchPacking, type SwitchRefusal } from './fused.js';
import { HandlerCode } from './handler-code.js';
import { paddedWithNops } from './jump.js';
import type { HandlerLayout, Refused } from './plan.js';
import { replacedSwitch, type WholeSwitch } from './replaced.js';

export type InlineRefusal =
  | SwitchRefusal
  /** The computed jump is longer than the code it would replace. */
  | 'site-too-short-for-inline';

/**
 * Lays out blocks in slack to which the site itself jumps: its loads, `add` and `jmp` become the computed jump. A block
 * sets only what the code at its case needs.
 *
 * An index out of range leads anywhere: the caller has proven the bound.
 */
export function inlineLayout(
  whole: WholeSwitch,
  packing: SwitchPacking,
): HandlerLayout | Refused<InlineRefusal> {
  const replaced = replacedSwitch(whole, { onlyLive: true });
  if ('refused' in replaced) return replaced;
  const packed = packSwitch(replaced, packing);
  if (packed === undefined) return { refused: 'does-not-fit' };
  const jump = jumpToBlock(replaced, packed.stride);
  if (jump === undefined) return { refused: 'no-register-for-address' };
  const { site, end, loads, interior, outcomes, overwritten } = replaced;
  const room = Number(end - site.gva);
  if (jump.length > room) return { refused: 'site-too-short-for-inline' };
  const size = packed.alignment - 1 + packed.size;
  return {
    size,
    replaces: loads,
    at(handler) {
      const blocks = alignUp(handler, BigInt(packed.alignment));
      const code = new HandlerCode(handler, size);
      packed.write(code, blocks);
      const { bytes } = code;
      const steps = jump.steps(site.gva, blocks);
      if (steps === undefined || bytes === undefined) return { refused: 'jump-out-of-range' };

      const exits = new Map<Gva, Exit>(code.exits);
      let at = site.gva;
      for (const { code: instruction, index } of steps) {
        // At the site itself a thread is not inside yet.
        if (at !== site.gva) exits.set(at, { rip: site.gva, index });
        at += BigInt(instruction.length);
      }
      const jumping = Buffer.from(steps.flatMap(({ code: instruction }) => instruction));
      return {
        handler: { gva: handler, bytes },
        site: { gva: site.gva, bytes: paddedWithNops(jumping, room) },
        interior,
        blocks: Number(blocks - handler),
        evacuation: new StacklessEvacuation(overwritten, outcomes.length, exits),
      };
    },
  };
}

import { encodeJump, JUMP_LENGTH, rel32 } from '../handlers/jump.js';
import type { Patch, Refused } from '../handlers/plan.js';
import type { Gva } from '../vmi/address.js';
import { MAX_INSTRUCTION_LENGTH } from '../x86/instruction.js';
import { type FunctionCode, type MovedInstruction, surveyFunction } from './survey.js';

/** The function to hook. */
export interface HookTarget extends FunctionCode {
  /** Places inside it that are known to be jumped to from elsewhere. */
  readonly branchTargets?: Iterable<Gva>;
}

/** A transparent detour: the function does what it did, by way of the trampoline. */
export interface DetourPlan {
  readonly refused?: undefined;
  /** The moved instructions and a jump to `back`. Written first. */
  readonly trampoline: Patch;
  /** What stands in their place: a jump to the trampoline, and NOPs. */
  readonly entry: Patch;
  /** The first instruction of the function that was not moved. */
  readonly back: Gva;
}

export type DetourRefusal =
  /** The function, or its way to its first return, has fewer bytes than a jump. */
  | 'too-short'
  /** Some of its bytes are no instruction, so that its branches are not known. */
  | 'undecodable'
  /** An instruction to move calls: the return address would lie in the trampoline. */
  | 'call'
  /** An instruction to move branches, returns or raises an interrupt. */
  | 'branch'
  /** Something branches behind the first byte of what would be replaced, or takes an address there. */
  | 'branch-target'
  /** An operand is relative to EIP (67h prefix), which an address in the trampoline cannot reach. */
  | 'eip-relative-operand'
  /** The last instruction to move holds off interrupts for the one after it, which stays behind. */
  | 'interrupt-shadow'
  /** An instruction to move can fault while RSP is changed, and the trampoline has no unwind data. */
  | 'fault-off-frame'
  /** The function and the trampoline are more than 2 GB apart. */
  | 'jump-out-of-range'
  /** A RIP-relative operand is more than 2 GB from the trampoline. */
  | 'operand-out-of-range';

/** The largest trampoline: moved bytes just short of a jump, one more instruction, the jump back. */
export const MAX_TRAMPOLINE_SIZE = JUMP_LENGTH - 1 + MAX_INSTRUCTION_LENGTH + JUMP_LENGTH;

/** Plans the detour of a function through a trampoline at `trampoline`. */
export function planDetour(target: HookTarget, trampoline: Gva): DetourPlan | Refused<DetourRefusal> {
  if (target.bytes.length < JUMP_LENGTH) return { refused: 'too-short' };
  const code = surveyFunction(target, JUMP_LENGTH);
  if (code === undefined) return { refused: 'undecodable' };

  const back = target.gva + BigInt(code.movedLength);
  for (const { flow, operand, end } of code.moved) {
    // What stands behind the way back to the caller may be padding, or another function.
    if (flow === 'return') return { refused: end < JUMP_LENGTH ? 'too-short' : 'branch' };
    if (flow !== 'next') return { refused: flow };
    if (operand?.relativeTo === 'eip') return { refused: 'eip-relative-operand' };
  }
  if ([...code.targets, ...(target.branchTargets ?? [])].some((at) => at > target.gva && at < back)) {
    return { refused: 'branch-target' };
  }
  if (code.moved.at(-1)?.shadowsNext) return { refused: 'interrupt-shadow' };
  if (faultsOffFrame(code.moved)) return { refused: 'fault-off-frame' };

  const moved = Buffer.from(target.bytes.subarray(0, code.movedLength));
  for (const { operand, end } of code.moved) {
    if (operand === undefined) continue;
    const displacement = rel32(trampoline + BigInt(end), operand.address);
    if (displacement === undefined) return { refused: 'operand-out-of-range' };
    moved.writeInt32LE(displacement, operand.displacementAt);
  }
  const entry = encodeJump(target.gva, trampoline, code.movedLength);
  const jumpBack = encodeJump(trampoline + BigInt(moved.length), back);
  if (entry === undefined || jumpBack === undefined) return { refused: 'jump-out-of-range' };
  return {
    trampoline: { gva: trampoline, bytes: Buffer.concat([moved, jumpBack]) },
    entry: { gva: target.gva, bytes: entry },
    back,
  };
}

/**
 * RIP-relative data and the stack are there whenever the function runs; anything else may fault. An unwinder
 * takes the trampoline for a leaf function, which is right until RSP has changed.
 */
function faultsOffFrame(moved: readonly MovedInstruction[]): boolean {
  const frameAt = moved.findIndex((instruction) => instruction.changesRsp);
  return frameAt >= 0 && moved.slice(frameAt + 1).some((instruction) => instruction.mayFault);
}

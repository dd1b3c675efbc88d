import type { Gva } from '../vmi/address.js';

/** `E9 rel32`: what a replaced instruction becomes, and how generated code goes back. */
export const JUMP_LENGTH = 5;
/** `EB rel8`: to something at most 127 bytes away. */
export const SHORT_JUMP_LENGTH = 2;
const JMP_REL32 = 0xe9;
const JMP_REL8 = 0xeb;
const NOP = 0x90;
const REL32_MIN = -(2n ** 31n);
const REL32_MAX = 2n ** 31n - 1n;
const REL8_MIN = -128n;
const REL8_MAX = 127n;

/** The displacement from the end of an instruction to `target`; `undefined` when it does not fit 32 bits. */
export function rel32(instructionEnd: Gva, target: Gva): number | undefined {
  const distance = target - instructionEnd;
  return distance >= REL32_MIN && distance <= REL32_MAX ? Number(distance) : undefined;
}

/**
 * A jump at `at` to `target`, padded with NOPs to `length` bytes (at least 5); `undefined` when `target` is
 * more than 2 GB away.
 */
export function encodeJump(at: Gva, target: Gva, length = JUMP_LENGTH): Buffer | undefined {
  const displacement = rel32(at + BigInt(JUMP_LENGTH), target);
  if (displacement === undefined) return undefined;
  const bytes = Buffer.alloc(length, NOP);
  bytes.writeUInt8(JMP_REL32, 0);
  bytes.writeInt32LE(displacement, 1);
  return bytes;
}

/** A short jump; `undefined` when `target` is too far away for it. */
export function encodeShortJump(at: Gva, target: Gva): Buffer | undefined {
  const distance = target - (at + BigInt(SHORT_JUMP_LENGTH));
  if (distance < REL8_MIN || distance > REL8_MAX) return undefined;
  return Buffer.of(JMP_REL8, Number(BigInt.asUintN(8, distance)));
}

/** Pads code with NOPs to `length` bytes. */
export function paddedWithNops(code: Uint8Array, length: number): Buffer {
  const bytes = Buffer.alloc(length, NOP);
  bytes.set(code);
  return bytes;
}

import type { Gva } from '../vmi/address.js';
import { GPR_NAMES, type GprName } from '../x86/registers.js';
import { rel32 } from './jump.js';

/** Never executed: between blocks that are shorter than their stride. */
export const INT3 = 0xcc;

const REX_W = 8;
const LEA = 0x8d;
const MOV_LOAD = 0x8b;
const MOVZX_BYTE = [0x0f, 0xb6];
const MOV_IMM32 = 0xb8;
const COMPARE_IMM8 = 0x83;
const COMPARE_IMM32 = 0x81;
/** ModRM of a comparison of a register. */
const COMPARE_EXTENSION = 0xf8;
const MAX_IMM8 = 127;
/** In place of a base: nothing but the displacement, relative to the next instruction. */
const RM_RIP = 5;
/** A SIB byte follows. */
const RM_SIB = 4;
/** As a base without a displacement it means something else. */
const LOW_BITS_OF_RBP = 5;

/** A register's number as the instruction holds it: three bits, and a fourth in the REX prefix. */
export function encoding(name: GprName): { readonly low: number; readonly high: boolean } {
  const number = GPR_NAMES.indexOf(name);
  return { low: number & 7, high: number >= 8 };
}

export function rex(extend: { r?: boolean; x?: boolean; b?: boolean }): number {
  return 0x40 | (extend.r ? 4 : 0) | (extend.x ? 2 : 0) | (extend.b ? 1 : 0);
}

export function rexW(extend: { r?: boolean; x?: boolean; b?: boolean }): number {
  return rex(extend) | REX_W;
}

export function u32(value: bigint): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(Number(BigInt.asUintN(32, value)));
  return bytes;
}

export type Scale = 1 | 2 | 4 | 8;

/** `mov dst32, [base + idx*4 + displacement]`, or, with a scale of 1, `movzx dst32, byte [base + idx + displacement]` */
export function loadEntry(
  dst: GprName,
  base: GprName,
  idx: GprName,
  scale: 1 | 4,
  displacement: number,
): number[] {
  const [prefix, , ...operands] = leaIndexed(dst, base, idx, scale, displacement);
  const narrow = prefix! & ~REX_W;
  const opcode = scale === 4 ? [MOV_LOAD] : MOVZX_BYTE;
  return [...(narrow === rex({}) ? [] : [narrow]), ...opcode, ...operands];
}

/** `lea dst, [base + idx*scale]`, with a displacement of 32 bits where one is given. */
export function leaIndexed(
  dst: GprName,
  base: GprName,
  idx: GprName,
  scale: Scale,
  displacement?: number,
): number[] {
  const [d, b, x] = [encoding(dst), encoding(base), encoding(idx)];
  const sib = (Math.log2(scale) << 6) | (x.low << 3) | b.low;
  const head = (mod: number) => [
    rexW({ r: d.high, x: x.high, b: b.high }),
    LEA,
    (mod << 6) | (d.low << 3) | RM_SIB,
    sib,
  ];
  if (displacement !== undefined) return [...head(2), ...u32(BigInt(displacement))];
  return b.low === LOW_BITS_OF_RBP ? [...head(1), 0] : head(0);
}

/** `lea dst32, [idx + idx*scale]`, for a result below 2^32. */
export function leaMultiple(dst: GprName, idx: GprName, scale: Scale): number[] {
  const [prefix, ...rest] = leaIndexed(dst, idx, idx, scale);
  const narrow = prefix! & ~REX_W;
  return narrow === rex({}) ? rest : [narrow, ...rest];
}

export const LEA_RELATIVE_LENGTH = 7;

/** `lea dst, [rip + ...]` at `at`; `undefined` when `target` is more than 2 GB away. */
export function leaRelative(dst: GprName, at: Gva, target: Gva): number[] | undefined {
  const displacement = rel32(at + BigInt(LEA_RELATIVE_LENGTH), target);
  if (displacement === undefined) return undefined;
  const { low, high } = encoding(dst);
  return [rexW({ r: high }), LEA, (low << 3) | RM_RIP, ...u32(BigInt(displacement))];
}

/** `jmp reg` */
export function jumpTo(register: GprName): number[] {
  const { low, high } = encoding(register);
  return [...(high ? [rex({ b: true })] : []), 0xff, 0xe0 | low];
}

/** `mov r32, imm32`: 5 bytes, 6 for r8 to r15. */
export function movImmediate(register: GprName, value: number): number[] {
  const { low, high } = encoding(register);
  return [...(high ? [rex({ b: true })] : []), MOV_IMM32 | low, ...u32(BigInt(value))];
}

/** `cmp register, value`: all 64 bits. */
export function compareTo(register: GprName, value: number): number[] {
  const { low, high } = encoding(register);
  const modrm = COMPARE_EXTENSION | low;
  const head = rexW({ b: high });
  return value <= MAX_IMM8
    ? [head, COMPARE_IMM8, modrm, value]
    : [head, COMPARE_IMM32, modrm, ...u32(BigInt(value))];
}

export const JUMP_IF_ABOVE_LENGTH = 6;

/** `ja target` at `at`, with 32 bits; `undefined` when `target` is more than 2 GB away. */
export function jumpIfAbove(at: Gva, target: Gva): number[] | undefined {
  const displacement = rel32(at + BigInt(JUMP_IF_ABOVE_LENGTH), target);
  return displacement === undefined ? undefined : [0x0f, 0x87, ...u32(BigInt(displacement))];
}

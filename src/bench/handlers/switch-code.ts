import { planHandlers } from '../../handlers/planner.js';
import type { FoundSwitch } from '../../switches/table.js';
import type { Gva } from '../../vmi/address.js';

/** A piece of machine code, at an offset in the image. */
export interface Piece {
  readonly offset: number;
  readonly bytes: Buffer;
}

/** A function that does one switch after the other, as Microsoft's compiler would have it. */
export interface SwitchFunction {
  readonly offset: number;
  /** The handler's bytes; 0 of the untouched switch. */
  readonly handlerBytes: number;
  readonly pieces: readonly Piece[];
}

/** Where a function lies, and its handler. */
export interface Placement {
  readonly image: Gva;
  readonly offset: number;
  readonly handlerOffset: number;
}

const CASE_STRIDE = 16;
const DWORD = 4;
const TABLE_ALIGNMENT = 4;

const NEXT_INDEX = Buffer.from('8b06 4883c604'.replaceAll(' ', ''), 'hex'); // mov eax, [rsi]; add rsi, 4
const LOAD = Buffer.from('8b8c82', 'hex'); // mov ecx, [rdx + rax*4 + ...]
const LOAD_LENGTH = LOAD.length + DWORD;
const ADD = Buffer.from('4803ca', 'hex'); // add rcx, rdx
const JMP = Buffer.from('ffe1', 'hex'); // jmp rcx
const CASE = Buffer.from('48ffcf 0f85'.replaceAll(' ', ''), 'hex'); // dec rdi; jne ...
const CASE_LENGTH = CASE.length + DWORD;
const RET = 0xc3;

/**
 * The function with a switch of so many cases: `f(count, indices, image)`, which does as little as possible besides.
 *
 * @param handler the name of a handler, as the planner has it; without it the switch is left as it is
 * @returns `undefined` when that handler is refused
 */
export function switchFunction(
  cases: number,
  handler: string | undefined,
  { image, offset, handlerOffset }: Placement,
): SwitchFunction | undefined {
  const site = offset + NEXT_INDEX.length;
  const add = site + LOAD_LENGTH;
  const jmp = add + ADD.length;
  const firstCase = Math.ceil((jmp + JMP.length) / CASE_STRIDE) * CASE_STRIDE;
  const values = Array.from({ length: cases }, (_, k) => firstCase + k * CASE_STRIDE);
  const end = firstCase + cases * CASE_STRIDE;
  const table = Math.ceil(end / TABLE_ALIGNMENT) * TABLE_ALIGNMENT;

  const code = Buffer.alloc(table + cases * DWORD - offset);
  const put = (at: number, bytes: Uint8Array) => code.set(bytes, at - offset);
  put(offset, NEXT_INDEX);
  put(site, Buffer.concat([LOAD, int32(table)]));
  put(add, Buffer.concat([ADD, JMP]));
  for (const [k, at] of values.entries()) {
    put(at, Buffer.concat([CASE, int32(offset - (at + CASE_LENGTH)), Buffer.of(RET)]));
    put(table + k * DWORD, int32(at));
  }
  const untouched = { offset, handlerBytes: 0, pieces: [{ offset, bytes: code }] };
  if (handler === undefined) return untouched;

  const part = (rva: number, length: number) => ({ rva, length, isBranchTarget: false });
  const proof: FoundSwitch = {
    ...{ found: true, form: 'one-level', baseIsImageBase: true, byteTable: undefined, adjacent: true },
    ...{ evidence: 'guard', liveAtCases: new Map() },
    ...part(site, LOAD_LENGTH),
    ...{ table, entries: cases, values, destination: 'rcx', base: 'rdx', index: 'rax', back: add },
    add: { ...part(add, ADD.length), bytes: ADD },
    jmp: { ...part(jmp, JMP.length), retpoline: false },
  };
  const plan = planHandlers(proof, image, 'auto').find(({ name }) => name === handler)!;
  if (plan.refused !== undefined) return undefined;
  const placed = plan.parts[0]!.at(image + BigInt(handlerOffset));
  if (placed.refused !== undefined) return undefined;
  put(site, placed.site.bytes);
  return {
    offset,
    handlerBytes: placed.handler.bytes.length,
    pieces: [...untouched.pieces, { offset: handlerOffset, bytes: placed.handler.bytes }],
  };
}

function int32(value: number): Buffer {
  const bytes = Buffer.alloc(DWORD);
  bytes.writeInt32LE(value);
  return bytes;
}

import { type Encoder, planHandlers } from '../../handlers/planner.js';
import type { FoundSwitch, SwitchPart } from '../../switches/table.js';
import type { Gva } from '../../vmi/address.js';
import { GPR_NAMES } from '../../x86/registers.js';

export const FORMS = ['one-level', 'two-level'] as const;
export type Form = (typeof FORMS)[number];

/** A piece of machine code, at an offset in the image. */
export interface Piece {
  readonly offset: number;
  readonly bytes: Buffer;
}

/** A function that does one switch after the other, as Microsoft's compiler would have it. */
export interface SwitchFunction {
  readonly offset: number;
  /** Of all handlers that its switch takes; 0 of the untouched switch. */
  readonly handlerBytes: number;
  readonly pieces: readonly Piece[];
}

/** What the planner is asked for. */
export interface MeasuredHandler {
  readonly encoder: Encoder;
  /** Of one of its packings; without it the fastest. */
  readonly name?: string;
}

/** Where a function lies, and its handler. */
export interface Placement {
  readonly image: Gva;
  readonly offset: number;
  readonly handlerOffset: number;
}

/** How many indices of a byte table lead to one case. */
const BYTES_PER_CASE = 4;
const CASE_STRIDE = 16;
const DWORD = 4;

const NEXT_INDEX = hex('8b06 4883c604'); // mov eax, [rsi]; add rsi, 4
const BYTE_LOAD = hex('0fb68402'); // movzx eax, byte [rdx + rax + ...]
const LOAD = hex('8b8c82'); // mov ecx, [rdx + rax*4 + ...]
const ADD = hex('4803ca'); // add rcx, rdx
const JMP = hex('ffe1'); // jmp rcx
const CASE = hex('48ffcf 0f85'); // dec rdi; jne ...
const CASE_LENGTH = CASE.length + DWORD;
const RET = hex('c3');

/** Each case overwrites these, and the flags, before it reads them. */
const DEAD_AT_CASES = ['rax', 'rcx'];

/** The index that leads to a case; in a byte table one of several, anywhere in it. */
export function indexOf(form: Form, cases: number, number: number): number {
  return form === 'one-level' ? number : number + (number % BYTES_PER_CASE) * cases;
}

/**
 * The function with a switch of so many cases: `f(count, indices, image)`, which does as little as possible besides.
 *
 * @param handler without it the switch is left as it is
 * @returns `undefined` when that handler is refused
 */
export function switchFunction(
  form: Form,
  cases: number,
  handler: MeasuredHandler | undefined,
  placement: Placement,
): SwitchFunction | undefined {
  const { code, proof } = untouchedSwitch(form, cases, placement.offset);
  const { image, offset, handlerOffset } = placement;
  if (handler === undefined) return { offset, handlerBytes: 0, pieces: [{ offset, bytes: code }] };

  const plan = planHandlers(proof, image, handler.encoder)
    .filter((plan) => plan.refused === undefined)
    .find(({ name }) => handler.name === undefined || name === handler.name);
  if (plan === undefined) return undefined;
  const handlers: Piece[] = [];
  let at = handlerOffset;
  for (const part of plan.parts) {
    const placed = part.at(image + BigInt(at));
    if (placed.refused !== undefined) return undefined;
    code.set(placed.site.bytes, Number(placed.site.gva - image) - offset);
    handlers.push({ offset: at, bytes: placed.handler.bytes });
    at += part.size;
  }
  return { offset, handlerBytes: plan.size, pieces: [{ offset, bytes: code }, ...handlers] };
}

/** The code of the function that lies at `offset`, with its tables, and what the recogniser would say of it. */
function untouchedSwitch(form: Form, cases: number, offset: number): { code: Buffer; proof: FoundSwitch } {
  const byteLength = form === 'two-level' ? BYTE_LOAD.length + DWORD : 0;
  const byteLoad = partAt(offset + NEXT_INDEX.length, byteLength);
  const load = partAt(endOf(byteLoad), LOAD.length + DWORD);
  const add = partAt(endOf(load), ADD.length);
  const jmp = partAt(endOf(add), JMP.length);
  const firstCase = Math.ceil(endOf(jmp) / CASE_STRIDE) * CASE_STRIDE;
  const values = Array.from({ length: cases }, (_, k) => firstCase + k * CASE_STRIDE);
  const table = firstCase + cases * CASE_STRIDE;
  const byteTable = table + cases * DWORD;
  const bytes = Array.from(
    { length: form === 'two-level' ? cases * BYTES_PER_CASE : 0 },
    (_, k) => k % cases,
  );

  const code = Buffer.alloc(byteTable + bytes.length - offset);
  const put = (at: number, ...pieces: readonly Uint8Array[]) => code.set(Buffer.concat(pieces), at - offset);
  put(offset, NEXT_INDEX);
  if (form === 'two-level') put(byteLoad.rva, BYTE_LOAD, int32(byteTable));
  put(load.rva, LOAD, int32(table), ADD, JMP);
  for (const [k, at] of values.entries()) {
    put(at, CASE, int32(offset - (at + CASE_LENGTH)), RET);
    put(table + k * DWORD, int32(at));
  }
  put(byteTable, Buffer.from(bytes));

  const base = { base: 'rdx', index: 'rax' } as const;
  const live = {
    registers: new Set(GPR_NAMES.filter((name) => !DEAD_AT_CASES.includes(name))),
    flags: false,
  };
  const proof: FoundSwitch = {
    ...{ found: true, form, baseIsImageBase: true, adjacent: true, evidence: 'guard' },
    ...{ ...load, ...base, table, entries: cases, values, destination: 'rcx', back: add.rva },
    byteTable:
      form === 'one-level'
        ? undefined
        : {
            ...byteLoad,
            ...base,
            table: byteTable,
            entries: bytes.length,
            values: bytes,
            destination: 'rax',
          },
    add: { ...add, bytes: ADD },
    jmp: { ...jmp, retpoline: false },
    liveAtCases: new Map(values.map((at) => [at, live])),
  };
  return { code, proof };
}

function partAt(rva: number, length: number): SwitchPart {
  return { rva, length, isBranchTarget: false };
}

function endOf({ rva, length }: SwitchPart): number {
  return rva + length;
}

function hex(digits: string): Buffer {
  return Buffer.from(digits.replaceAll(' ', ''), 'hex');
}

function int32(value: number): Buffer {
  const bytes = Buffer.alloc(DWORD);
  bytes.writeInt32LE(value);
  return bytes;
}

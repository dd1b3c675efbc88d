import type { Liveness } from '../switches/liveness.js';
import type { Gva } from '../vmi/address.js';
import { decodeInstruction, gprName, Mnemonic } from '../x86/instruction.js';
import type { GprName } from '../x86/registers.js';
import { movImmediate } from './encoding.js';
import { IN_TRAP_FRAME, type Overwritten } from './evacuation.js';
import type { LoadSite, Refused } from './plan.js';
import { type LoadRefusal, refusalOf } from './refusal.js';

/** What the code that a handler stands in for does with one index. */
export interface Outcome {
  /** Instructions. */
  readonly code: readonly (readonly number[])[];
  readonly leadsTo: Gva;
}

/** Code of the guest that a handler stands in for: its loads, or a switch from its first load to its jump. */
export interface Replaced {
  readonly site: LoadSite;
  /** Behind the last instruction that is replaced. */
  readonly end: Gva;
  readonly loads: readonly Gva[];
  /** The instructions behind the first. */
  readonly interior: readonly Gva[];
  /** Holds the image base when control comes to the site. */
  readonly base: GprName;
  /** What it overwrites for every index and does not need before: each can hold an address on the way. */
  readonly outputs: readonly GprName[];
  readonly overwritten: Overwritten;
  /** By index. */
  readonly outcomes: readonly Outcome[];
}

export type ReplacedRefusal =
  | LoadRefusal
  /** A thread that was preempted in the handler could not get back a register that the load needs. */
  | 'register-not-in-frame';

/** The loads of a switch. Of two, the second stands behind the first, and nothing may branch to it. */
export interface SwitchLoads {
  /** The load of the dword table. */
  readonly load: LoadSite;
  readonly entries: ArrayLike<number>;
  /** The load of the byte table in front of it, whose destination is its index. */
  readonly byteLoad?: { readonly load: LoadSite; readonly entries: ArrayLike<number> };
}

export type LoadsRefusal =
  | ReplacedRefusal
  /** The byte table leads beyond the entries that are known. */
  | 'byte-beyond-table';

/** Loads alone: what they read comes into their registers, and the code goes on behind the last. */
export function replacedLoads(loads: SwitchLoads): Replaced | Refused<LoadsRefusal> {
  const { load } = loads;
  const end = load.gva + BigInt(load.length);
  return replacedUpTo(end, [], loads, (entry, byte) => ({
    code: [...byteOf(loads, byte), movImmediate(load.dst, entry)],
    leadsTo: end,
  }));
}

/** A switch whose loads, `add` and `jmp` stand together. Nothing may branch to any of them but the first. */
export interface WholeSwitch extends SwitchLoads {
  /** `add dst, register`, which holds the image base. */
  readonly add: Uint8Array;
  /** Bytes of `jmp dst`. */
  readonly jmpLength: number;
  /** What the code at a case needs; absent: all. */
  liveAt?(entry: number): Liveness | undefined;
}

export type WholeSwitchRefusal =
  | LoadsRefusal
  /** It is not the load's destination to which the image base is added. */
  | 'another-add';

/**
 * A whole switch, up to its cases.
 *
 * @param onlyLive registers and flags that the code at a case does not need are not set
 */
export function replacedSwitch(
  whole: WholeSwitch,
  { onlyLive } = { onlyLive: false },
): Replaced | Refused<WholeSwitchRefusal> {
  const { load, byteLoad, add, jmpLength } = whole;
  if (!addsBase(add, load.dst, outputsOf(whole))) return { refused: 'another-add' };
  const addAt = load.gva + BigInt(load.length);
  const jmpAt = addAt + BigInt(add.length);
  return replacedUpTo(jmpAt + BigInt(jmpLength), [addAt, jmpAt], whole, (entry, byte) => {
    const live = onlyLive ? whole.liveAt?.(entry) : undefined;
    const isLive = (register: GprName) => live?.registers.has(register) ?? true;
    const code: (readonly number[])[] = [];
    if (byteLoad !== undefined && isLive(byteLoad.load.dst)) code.push(...byteOf(whole, byte));
    // The flags are those of the addition.
    if (isLive(load.dst) || live?.flags !== false) code.push(movImmediate(load.dst, entry), [...add]);
    return { code, leadsTo: BigInt.asUintN(64, load.baseValue + BigInt(entry)) };
  });
}

/** What brings the byte into its register, if it stays there. */
function byteOf({ load, byteLoad }: SwitchLoads, byte: number | undefined): number[][] {
  const dst = byteLoad?.load.dst;
  return byte === undefined || dst === undefined || dst === load.dst ? [] : [movImmediate(dst, byte)];
}

function outputsOf({ load, byteLoad }: SwitchLoads): GprName[] {
  return [...new Set([load.dst, byteLoad?.load.dst ?? load.dst])];
}

/** @param behind the instructions behind the loads */
function replacedUpTo(
  end: Gva,
  behind: readonly Gva[],
  loads: SwitchLoads,
  outcome: (entry: number, byte?: number) => Outcome,
): Replaced | Refused<LoadsRefusal> {
  const { load, entries, byteLoad } = loads;
  const site = byteLoad?.load ?? load;
  const outputs = outputsOf(loads);
  const bytes = byteLoad && Array.from(byteLoad.entries);
  if (bytes?.some((byte) => byte >= entries.length)) return { refused: 'byte-beyond-table' };
  const second = byteLoad === undefined ? [] : [load.gva];
  return checked({
    site,
    end,
    loads: [site.gva, ...second],
    interior: [...second, ...behind],
    base: load.base,
    outputs,
    overwritten: overwrittenBy(outputs, site.idx, [...new Set([site.base, load.base])], load.baseValue),
    outcomes:
      bytes?.map((byte) => outcome(entries[byte]!, byte)) ?? Array.from(entries, (entry) => outcome(entry)),
  });
}

function overwrittenBy(
  outputs: readonly GprName[],
  idx: GprName,
  bases: readonly GprName[],
  baseValue: Gva,
): Overwritten {
  return {
    idx: outputs.includes(idx) ? idx : undefined,
    bases: bases.filter((base) => outputs.includes(base)),
    baseValue,
  };
}

function checked(replaced: Replaced): Replaced | Refused<ReplacedRefusal> {
  const { site, outcomes, overwritten } = replaced;
  const refused = refusalOf(site, outcomes.length);
  if (refused !== undefined) return { refused };
  const lost = [...overwritten.bases, ...(overwritten.idx === undefined ? [] : [overwritten.idx])];
  return lost.every((register) => IN_TRAP_FRAME.has(register))
    ? replaced
    : { refused: 'register-not-in-frame' };
}

/** Whether it is `add dst, register` with a register that none of the loads has overwritten. */
function addsBase(add: Uint8Array, dst: GprName, outputs: readonly GprName[]): boolean {
  const instruction = decodeInstruction(add, 0n);
  const [to, what] = instruction?.operands ?? [];
  if (instruction?.mnemonic !== Mnemonic.Add || to?.kind !== 'register' || what?.kind !== 'register')
    return false;
  return to.size === 8 && gprName(to.register) === dst && !outputs.includes(gprName(what.register));
}

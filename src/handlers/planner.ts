import type { FoundSwitch } from '../switches/table.js';
import type { Gva } from '../vmi/address.js';
import { type Dispatch, type FusedRefusal, fusedLayout } from './fused.js';
import { LEAN_PACKINGS, type LeanPacking, type LeanRefusal, leanLayout } from './lean.js';
import type { HandlerLayout, Refused, TableLoad } from './plan.js';
import { seedLayout } from './seed.js';

/** What lays a handler out. */
export const ENCODERS = ['seed', 'lean', 'fused'] as const;
export type Encoder = (typeof ENCODERS)[number];

/** Which encoders may be used; `auto`: all of them, the fastest first. */
export const HANDLER_CHOICES = ['auto', ...ENCODERS] as const;
export type HandlerChoice = (typeof HANDLER_CHOICES)[number];

/** Why the rest of a switch cannot be done by the load's handler. */
type DispatchRefusal =
  /** Load, `add` and `jmp` do not stand together. */
  | 'not-adjacent'
  /** Something branches to the `add` or the `jmp`, and expects the table's entry in its register. */
  | 'branch-target'
  /** The kernel has replaced the `jmp`; it does not want one. */
  | 'retpoline';

export type HandlerRefusal = LeanRefusal | FusedRefusal | DispatchRefusal | 'jump-out-of-range';

/** Room for a generous handler: this many of its size would have to fit into what slack is left. */
const SPARE_HANDLERS = 32;

/** Operand and address sizes of what the recogniser accepts. */
const ACCEPTED_BITS = { dstBits: 32, addressBits: 64 } as const;

/** An encoder, and how it packs. */
interface Way {
  readonly encoder: Encoder;
  readonly name: string;
}

/** What the loads of a switch can be replaced by. */
export interface Candidate extends Way {
  readonly refused?: undefined;
  /** All are needed: one handler, or one for each load of a two-level switch. */
  readonly parts: readonly HandlerLayout[];
  /** Of all parts, in bytes. */
  readonly size: number;
}

/** What an encoder says to a switch. */
export type HandlerPlanning = Candidate | (Way & Refused<HandlerRefusal>);

/**
 * What each encoder that may be used says to the load of `proof`, in an image at `imageBase`; those with the fastest
 * handlers first.
 */
export function planHandlers(
  proof: FoundSwitch,
  imageBase: Gva,
  choice: HandlerChoice,
): readonly HandlerPlanning[] {
  const load = loadOf(proof, imageBase);
  const entries = Uint32Array.from(proof.values);
  const lean = (packing: LeanPacking) =>
    planning({ encoder: 'lean', name: `lean-${packing}` }, leanLayout(load, entries, packing));
  const dispatch = dispatchOf(proof, imageBase);
  const all = [
    planning(
      { encoder: 'fused', name: 'fused' },
      'refused' in dispatch ? dispatch : fusedLayout(load, dispatch, entries),
    ),
    ...LEAN_PACKINGS.map(lean),
    planning({ encoder: 'seed', name: 'seed' }, seedLayout(load, entries)),
  ];
  return all.filter(({ encoder }) => choice === 'auto' || choice === encoder);
}

/**
 * The handlers that `freeSlack` bytes allow, in the same order: a fast but large one must not use up what other loads
 * will need. The smallest is always allowed, and `seed` where no other can be placed.
 */
export function affordable(plans: readonly HandlerPlanning[], freeSlack: number): Candidate[] {
  const candidates = plans.filter(isCandidate);
  const sizes = candidates.filter(({ encoder }) => encoder !== 'seed').map(({ size }) => size);
  const smallest = Math.min(...sizes);
  return candidates.filter(
    ({ encoder, size }) => encoder === 'seed' || size === smallest || size * SPARE_HANDLERS <= freeSlack,
  );
}

/** Why no handler faster than `taken` was taken, by name. */
export function passedOver(
  plans: readonly HandlerPlanning[],
  taken: Candidate,
): Record<string, HandlerRefusal | 'too-little-slack'> {
  const faster = plans.slice(0, plans.indexOf(taken));
  return Object.fromEntries(faster.map(({ name, refused }) => [name, refused ?? 'too-little-slack']));
}

function isCandidate(plan: HandlerPlanning): plan is Candidate {
  return plan.refused === undefined;
}

function planning(way: Way, layout: HandlerLayout | Refused<HandlerRefusal>): HandlerPlanning {
  return layout.refused === undefined
    ? { ...way, parts: [layout], size: layout.size }
    : { ...way, refused: layout.refused };
}

function loadOf({ rva, length, destination, index, base }: FoundSwitch, imageBase: Gva): TableLoad {
  return {
    gva: imageBase + BigInt(rva),
    length,
    dst: destination,
    idx: index,
    base,
    baseValue: imageBase,
    ...ACCEPTED_BITS,
  };
}

function dispatchOf(
  { add, jmp, adjacent }: FoundSwitch,
  imageBase: Gva,
): Dispatch | Refused<DispatchRefusal> {
  if (!adjacent) return { refused: 'not-adjacent' };
  if (add.isBranchTarget || jmp.isBranchTarget) return { refused: 'branch-target' };
  if (jmp.retpoline) return { refused: 'retpoline' };
  return { add: add.bytes, imageBase };
}

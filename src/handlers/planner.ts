import type { ByteTable, FoundSwitch } from '../switches/table.js';
import type { Gva } from '../vmi/address.js';
import { fusedLayout, SWITCH_PACKINGS, type SwitchPacking } from './fused.js';
import { guardedLayout } from './guarded.js';
import { type InlineRefusal, inlineLayout } from './inline.js';
import { LEAN_PACKINGS, type LeanPacking, type LeanRefusal, leanLayout } from './lean.js';
import type { HandlerLayout, LoadSite, Refused } from './plan.js';
import type { SwitchLoads, WholeSwitch } from './replaced.js';
import { seedLayout } from './seed.js';

/** What lays a handler out. */
export const ENCODERS = ['seed', 'lean', 'fused', 'inline', 'guarded'] as const;
export type Encoder = (typeof ENCODERS)[number];

/**
 * Which encoders may be used; `auto`: all of them, the fastest first, but `guarded` for tables whose end is not proven
 * only.
 */
export const HANDLER_CHOICES = ['auto', ...ENCODERS] as const;
export type HandlerChoice = (typeof HANDLER_CHOICES)[number];

/** Why the rest of a switch cannot be done by the handler of its first load. */
type DispatchRefusal =
  /** Its loads, `add` and `jmp` do not stand together. */
  | 'not-adjacent'
  /** Something branches to one of them behind the first, and expects what the first has loaded. */
  | 'branch-target'
  /** The kernel has replaced the `jmp`; it does not want one. */
  | 'retpoline';

export type HandlerRefusal =
  | LeanRefusal
  | InlineRefusal
  | DispatchRefusal
  | 'jump-out-of-range'
  /** Only a handler with a guard may be used. */
  | 'bound-not-proven';

/**
 * Slack that is kept for the smallest handlers of other switches, in bytes: some sixty of them. Which loads are hot, and
 * how many, nobody knows before.
 */
const KEPT_SLACK = 10_240;
/** Of what is left besides, a handler may take one part more than the smallest would: the hottest loads come first. */
const SPENT_PARTS = 16;

const PROVEN_FASTEST_FIRST = ['inline', 'fused', 'lean', 'seed'] as const;
const UNPROVEN = ['guarded'] as const;

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

type Layout = HandlerLayout | Refused<HandlerRefusal>;
/** One of the loads of a switch. */
type Load = Pick<SwitchLoads, 'load' | 'entries'>;

/**
 * What each encoder that may be used says to a switch, in an image at `imageBase`; those with the fastest handlers first.
 * Of an encoder's packings, one that is as large as a faster one is left out.
 */
export function planHandlers(
  proof: FoundSwitch,
  imageBase: Gva,
  choice: HandlerChoice,
): readonly HandlerPlanning[] {
  const isProven = proof.evidence !== 'none';
  const chosen = choice === 'auto' ? (isProven ? PROVEN_FASTEST_FIRST : UNPROVEN) : [choice];
  return chosen.flatMap((encoder): HandlerPlanning[] =>
    isProven || encoder === 'guarded'
      ? waysOf(encoder, proof, imageBase)
      : [{ encoder, name: encoder, refused: 'bound-not-proven' }],
  );
}

function waysOf(encoder: Encoder, proof: FoundSwitch, imageBase: Gva): HandlerPlanning[] {
  const { table } = replaceableByteTable(proof) ?? proof;
  switch (encoder) {
    case 'inline':
      return switchWays('inline', proof, imageBase, inlineLayout);
    case 'fused':
      return switchWays('fused', proof, imageBase, fusedLayout);
    case 'lean':
      return leanWays(proof, imageBase);
    case 'guarded':
      return switchWays('guarded', proof, imageBase, (whole, packing) =>
        guardedLayout(whole, table, packing),
      );
    case 'seed':
      return [
        planning(
          'seed',
          'seed',
          loadsOf(proof, imageBase).map(({ load, entries }) => seedLayout(load, entries)),
        ),
      ];
  }
}

/**
 * The handlers that `freeSlack` bytes allow, in the same order: a fast but large one must not use up what other loads
 * will need. The smallest is always allowed, and `seed` where no other can be placed.
 */
export function affordable(plans: readonly HandlerPlanning[], freeSlack: number): Candidate[] {
  const candidates = plans.filter(isCandidate);
  const sizes = candidates.filter(({ encoder }) => encoder !== 'seed').map(({ size }) => size);
  const most = Math.min(...sizes) + Math.max(0, (freeSlack - KEPT_SLACK) / SPENT_PARTS);
  return candidates.filter(({ encoder, size }) => encoder === 'seed' || size <= most);
}

/** Why no handler faster than `taken` was taken, by name: as far as that was known before a place was looked for. */
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

function planning(encoder: Encoder, name: string, parts: readonly Layout[]): HandlerPlanning {
  const layouts: HandlerLayout[] = [];
  for (const part of parts) {
    if (part.refused !== undefined) return { encoder, name, refused: part.refused };
    layouts.push(part);
  }
  return { encoder, name, parts: layouts, size: layouts.reduce((sum, { size }) => sum + size, 0) };
}

/** Without those that are no smaller than a faster one. */
function worthwhile(plans: readonly HandlerPlanning[]): HandlerPlanning[] {
  let smallest = Number.POSITIVE_INFINITY;
  return plans.filter((plan) => {
    if (plan.refused !== undefined) return true;
    if (plan.size >= smallest) return false;
    smallest = plan.size;
    return true;
  });
}

/** A handler for both loads of a two-level switch where they stand together, otherwise one for each. */
function leanWays(proof: FoundSwitch, imageBase: Gva): HandlerPlanning[] {
  const { isBranchTarget } = proof;
  const byteTable = replaceableByteTable(proof);
  const loads = loadsOf(proof, imageBase);
  const ways = (parts: readonly SwitchLoads[]) =>
    worthwhile(LEAN_PACKINGS.map((packing) => leanWay(packing, parts)));
  if (byteTable !== undefined && areTogether(byteTable, proof) && !isBranchTarget) {
    const [byteLoad, load] = loads as [Load, Load];
    const possible = ways([{ ...load, byteLoad }]).filter(isCandidate);
    if (possible.length > 0) return possible;
  }
  return ways(loads);
}

function leanWay(packing: LeanPacking, loads: readonly SwitchLoads[]): HandlerPlanning {
  const parts = loads.map((each) => leanPart(each, packing, loads.length > 1));
  return planning('lean', `lean-${packing}`, parts);
}

/**
 * @param orElse takes the smallest that is possible where that packing is not: the other load of the switch may have it
 */
function leanPart(loads: SwitchLoads, packing: LeanPacking, orElse: boolean): Layout {
  const layout = leanLayout(loads, packing);
  if (layout.refused !== 'too-many-entries-for-short-jumps' || !orElse) return layout;
  return smallestLean(loads);
}

function smallest(layouts: readonly Layout[]): Layout {
  const sizeOf = (layout: Layout) => (layout.refused === undefined ? layout.size : Number.POSITIVE_INFINITY);
  return layouts.reduce((best, layout) => (sizeOf(layout) < sizeOf(best) ? layout : best));
}

/** One handler for all of a switch; or, where the byte load stands apart, one for that and one for the rest. */
function switchWays(
  encoder: Encoder,
  proof: FoundSwitch,
  imageBase: Gva,
  layOut: (whole: WholeSwitch, packing: SwitchPacking) => Layout,
): HandlerPlanning[] {
  const byteTable = replaceableByteTable(proof);
  const whole = wholeSwitch(proof, byteTable, imageBase);
  // A handler for the byte load alone would have no guard.
  const mayBeDivided = byteTable !== undefined && encoder !== 'guarded';
  const rest = 'refused' in whole && mayBeDivided ? wholeSwitch(proof, undefined, imageBase) : whole;
  if ('refused' in rest) return [{ encoder, name: encoder, refused: rest.refused }];
  const apart = rest === whole ? [] : [byteTable!];
  const ways = SWITCH_PACKINGS.map((packing) => {
    const before = apart.map((table) => smallestLean(withTable(table, imageBase)));
    return planning(encoder, `${encoder}-${packing}`, [...before, layOut(rest, packing)]);
  });
  const possible = worthwhile(ways).filter(isCandidate);
  if (possible.length === 0) {
    // That a packing does not fit says nothing of the switch: another one does.
    const way = ways.find(({ refused }) => refused !== 'does-not-fit')!;
    return [{ ...way, name: encoder }];
  }
  return possible.map((way, at) => (at === 0 ? { ...way, name: encoder } : way));
}

function smallestLean(loads: SwitchLoads): Layout {
  return smallest(LEAN_PACKINGS.map((packing) => leanLayout(loads, packing)));
}

function loadsOf(proof: FoundSwitch, imageBase: Gva): Load[] {
  const load = withTable(proof, imageBase);
  const byteTable = replaceableByteTable(proof);
  return byteTable === undefined ? [load] : [withTable(byteTable, imageBase), load];
}

/** Absent where the byte load has to stay as it is. */
function replaceableByteTable({ byteTable }: FoundSwitch): ByteTable | undefined {
  return byteTable?.refused === undefined ? byteTable : undefined;
}

function withTable(part: FoundSwitch | ByteTable, imageBase: Gva): Load {
  return { load: loadOf(part, imageBase), entries: part.values };
}

/** Nothing stands between the two loads of a switch. */
function areTogether(byteTable: ByteTable, { rva, index }: FoundSwitch): boolean {
  return byteTable.rva + byteTable.length === rva && byteTable.destination === index;
}

function loadOf(
  { rva, length, destination, index, base }: FoundSwitch | ByteTable,
  imageBase: Gva,
): LoadSite {
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

/** The switch from `byteTable`'s load on, or from the dword load on without one. */
function wholeSwitch(
  proof: FoundSwitch,
  byteTable: ByteTable | undefined,
  imageBase: Gva,
): WholeSwitch | Refused<DispatchRefusal> {
  const { isBranchTarget, values, add, jmp, adjacent, liveAtCases } = proof;
  if (!adjacent || !(byteTable === undefined || areTogether(byteTable, proof)))
    return { refused: 'not-adjacent' };
  const behind = [
    ...(byteTable === undefined ? [] : [isBranchTarget]),
    add.isBranchTarget,
    jmp.isBranchTarget,
  ];
  if (behind.includes(true)) return { refused: 'branch-target' };
  if (jmp.retpoline) return { refused: 'retpoline' };
  return {
    load: loadOf(proof, imageBase),
    entries: values,
    ...(byteTable && { byteLoad: withTable(byteTable, imageBase) }),
    add: add.bytes,
    jmpLength: jmp.length,
    liveAt: (entry) => liveAtCases.get(entry),
  };
}

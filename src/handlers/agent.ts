import type { Gva } from '../vmi/address.js';
import {
  encodeDispatcher,
  encodeRemovedPair,
  encodeTable,
  IRETQ,
  inBuckets,
  PAIR_SIZE,
  PAIRS_AT,
  RESTORE,
} from './agent-dispatcher.js';
import { encoding, INT3, rex, u32 } from './encoding.js';
import { type Evacuation, NoEvacuation } from './evacuation.js';
import type { LoadSite, Patch, Refused } from './plan.js';
import { type LoadRefusal, refusalOf } from './refusal.js';
import { encodeHeader, SEED_BLOCK_SIZE, SEED_MOST_ENTRIES } from './seed.js';

/** What the sites raise. */
export const AGENT_VECTOR = 20;
export const MAX_AGENT_LOADS = 256;

/** A load, and what its table holds. */
export interface AgentLoad {
  readonly load: LoadSite;
  readonly entries: Uint32Array;
}

/** Memory that the guest's kernel may execute and that nobody else uses, wherever it is. */
export interface AgentMemory {
  readonly gva: Gva;
  /** In bytes. */
  readonly size: number;
}

/** What becomes of one load. */
export interface AgentRelocation {
  /** `INT 20`, with prefixes in front that say nothing. */
  readonly site: Patch;
  /**
   * Takes this one's pair and handler out of the region, and changes nothing else: once the load is back in its place
   * and no thread is in `evacuation`.
   */
  readonly removal: readonly Patch[];
  /** Of its handler and of the dispatcher: a thread in there may be on its way to any handler. */
  readonly evacuation: Evacuation;
}

/** A dispatcher, with the handlers of all loads. */
export interface AgentRegion {
  readonly refused?: undefined;
  /** Written before any site. */
  readonly region: Patch;
  /** Where the guest's vector 20 has to lead, by an interrupt gate or a trap gate. */
  readonly dispatcher: Gva;
  /** In the order of the loads. */
  readonly relocations: readonly AgentRelocation[];
  readonly evacuation: Evacuation;
}

export type AgentRefused =
  | (Refused<
      | LoadRefusal
      /** An earlier one ends at the same address. */
      | 'load-given-twice'
    > & { readonly load: Gva })
  | Refused<'too-many-loads'>
  /** How many bytes it would take. */
  | (Refused<'region-too-small'> & { readonly needed: number });

const OPERAND_SIZE_PREFIX = 0x66;
const INT = [0xcd, AGENT_VECTOR];
const MOV_IMM32 = 0xb8;
/** So that a pair is removed by writes that a processor sees whole. */
const ALIGNMENT = 16n;

/**
 * Lays out the seed's variant for handlers that lie anywhere: each load becomes an `INT 20`, whose dispatcher finds the
 * handler by the return address, and handlers end in IRETQ. For every index below `entries.length`, registers, flags
 * and RIP are then those that the load would have left.
 *
 * An index out of range leads anywhere: the caller has proven the bound. IRETQ ends the blocking of NMIs: none of the
 * loads may be one that the handler of NMIs executes.
 *
 * @param chain where an INT 20 of somebody else goes on, with registers and stack as it was raised; else it returns
 */
export function agentRegion(
  loads: readonly AgentLoad[],
  { gva, size }: AgentMemory,
  chain?: Gva,
): AgentRegion | AgentRefused {
  const refused = whyRefused(loads);
  if (refused !== undefined) return refused;

  const table = gva + (-gva & (ALIGNMENT - 1n));
  const dispatcher = table + BigInt(PAIRS_AT + loads.length * PAIR_SIZE);
  const code = encodeDispatcher(dispatcher, table, chain !== undefined);
  let end = dispatcher + BigInt(code.length);
  const handlers = loads.map(({ load, entries }) => {
    const handler = end;
    const bytes = encodeHandler(load, entries, handler);
    end += BigInt(bytes.length);
    return { returnTo: load.gva + BigInt(load.length), handler, bytes };
  });
  const needed = Number(end - gva);
  if (needed > size) return { refused: 'region-too-small', needed };

  const pairs = inBuckets(handlers);
  const bytes = Buffer.concat([
    Buffer.alloc(Number(table - gva), INT3),
    encodeTable(pairs, chain),
    code,
    ...handlers.map((handler) => handler.bytes),
  ]);
  const inDispatcher = new NoEvacuation({ gva: dispatcher, size: code.length });
  const relocations = handlers.map((relocated, at): AgentRelocation => {
    const { load } = loads[at]!;
    const pair = table + BigInt(PAIRS_AT + pairs.indexOf(relocated) * PAIR_SIZE);
    const length = relocated.bytes.length;
    const inHandler = new NoEvacuation({ gva: relocated.handler, size: length });
    return {
      site: { gva: load.gva, bytes: encodeSite(load.length) },
      removal: [
        { gva: pair, bytes: encodeRemovedPair() },
        { gva: relocated.handler, bytes: Buffer.alloc(length, INT3) },
      ],
      evacuation: { evacuate: (thread) => inDispatcher.evacuate(thread) ?? inHandler.evacuate(thread) },
    };
  });
  return {
    region: { gva, bytes },
    dispatcher,
    relocations,
    evacuation: new NoEvacuation({ gva, size: needed }),
  };
}

function whyRefused(loads: readonly AgentLoad[]): AgentRefused | undefined {
  if (loads.length > MAX_AGENT_LOADS) return { refused: 'too-many-loads' };
  const ends = new Set<Gva>();
  for (const { load, entries } of loads) {
    const end = load.gva + BigInt(load.length);
    const refused =
      refusalOf(load, entries.length, SEED_MOST_ENTRIES) ?? (ends.has(end) ? 'load-given-twice' : undefined);
    if (refused !== undefined) return { refused, load: load.gva };
    ends.add(end);
  }
  return undefined;
}

function encodeSite(length: number): Buffer {
  const bytes = Buffer.alloc(length, OPERAND_SIZE_PREFIX);
  bytes.set(INT, length - INT.length);
  return bytes;
}

/** The seed's, with the dispatcher's registers to restore in front, and blocks that end in IRETQ. */
function encodeHandler(load: LoadSite, entries: Uint32Array, at: Gva): Buffer {
  const dst = encoding(load.dst);
  const blocks = Array.from(entries, (entry) => {
    const block = Buffer.alloc(SEED_BLOCK_SIZE, INT3);
    block.set([rex({ b: dst.high }), MOV_IMM32 | dst.low, ...u32(BigInt(entry)), ...IRETQ]);
    return block;
  });
  const header = encodeHeader(load, at + BigInt(RESTORE.length));
  return Buffer.concat([Buffer.from(RESTORE), header, ...blocks]);
}

import { MemtablesError } from '../errors.js';
import { type Gva, hex } from '../vmi/address.js';
import type { SlackRegion } from './regions.js';

/** Slack in use; give the same object back to `free`. */
export type SlackBlock = SlackRegion;

/**
 * Hands out slack: first fit, in the order of the regions; freed space is joined with its neighbours. Slack belongs to
 * nobody: what something else has used meanwhile is never handed out.
 */
export class SlackAllocator {
  /** Size of all slack, used or not. */
  readonly bytes: number;
  readonly #regions: readonly Region[];
  readonly #used = new Map<SlackBlock, Region>();

  /**
   * @param regions must not overlap; those of `findSlack` do not.
   * @param read returns guest memory as it is, `undefined` where nothing is mapped any more
   */
  constructor(
    regions: readonly SlackRegion[],
    private readonly read: (gva: Gva, length: number) => Uint8Array | undefined,
  ) {
    this.bytes = totalSize(regions);
    this.#regions = regions.map((region) => ({ holes: [region] }));
  }

  /**
   * Reserves `size` contiguous bytes, all of them zero now; nothing is written.
   *
   * @throws MemtablesError `SLACK_EXHAUSTED` when no hole is large enough, with all holes in the context,
   *   `INVALID_ARGUMENT` for a size that is no positive integer, or what `read` throws.
   */
  allocate(size: number): SlackBlock {
    if (!Number.isSafeInteger(size) || size <= 0) {
      throw new MemtablesError('INVALID_ARGUMENT', `slack of ${size} bytes was asked for`, {
        remedy: 'Ask for at least one byte.',
        context: { size },
      });
    }
    for (const region of this.#regions) {
      for (let block = take(region, size); block !== undefined; block = take(region, size)) {
        // Otherwise it is lost.
        if (this.read(block.gva, size)?.every((byte) => byte === 0)) {
          this.#used.set(block, region);
          return block;
        }
      }
    }
    throw new MemtablesError('SLACK_EXHAUSTED', `no hole of ${size} bytes is left in the image's slack`, {
      remedy: 'Relocate fewer or smaller tables, or place fewer hooks.',
      context: { size, free: this.freeBytes, holes: this.freeMap },
    });
  }

  /**
   * Makes the block's space available again. The caller has zeroed it.
   *
   * @throws MemtablesError `INVALID_ARGUMENT` for a block that is not allocated here (any more).
   */
  free(block: SlackBlock): void {
    const region = this.#used.get(block);
    if (region === undefined) {
      throw new MemtablesError('INVALID_ARGUMENT', `the slack at ${hex(block.gva)} is not allocated`, {
        remedy: 'Free a block once, with the object that `allocate` returned.',
        context: { gva: block.gva, size: block.size },
      });
    }
    this.#used.delete(block);
    region.holes = joined([...region.holes, block].sort((a, b) => (a.gva < b.gva ? -1 : 1)));
  }

  get freeBytes(): number {
    return totalSize(this.freeMap);
  }

  /** The holes, by region and address. */
  get freeMap(): readonly SlackRegion[] {
    return this.#regions.flatMap((region) => region.holes);
  }
}

/** What is free of one region of slack, by address; no two holes touch. */
interface Region {
  holes: SlackRegion[];
}

/** Cuts a block off the first hole that is large enough. */
function take(region: Region, size: number): SlackBlock | undefined {
  const at = region.holes.findIndex((hole) => hole.size >= size);
  const hole = region.holes[at];
  if (hole === undefined) return undefined;
  const block = { section: hole.section, gva: hole.gva, size };
  const rest = { section: hole.section, gva: endOf(block), size: hole.size - size };
  region.holes.splice(at, 1, ...(rest.size > 0 ? [rest] : []));
  return block;
}

function joined(holes: readonly SlackRegion[]): SlackRegion[] {
  const result: SlackRegion[] = [];
  for (const hole of holes) {
    const last = result.at(-1);
    if (last !== undefined && endOf(last) === hole.gva) {
      result.splice(-1, 1, { ...last, size: last.size + hole.size });
    } else {
      result.push(hole);
    }
  }
  return result;
}

function endOf(region: SlackRegion): Gva {
  return region.gva + BigInt(region.size);
}

function totalSize(regions: readonly SlackRegion[]): number {
  return regions.reduce((sum, region) => sum + region.size, 0);
}

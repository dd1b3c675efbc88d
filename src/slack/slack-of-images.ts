import { MemtablesError } from '../errors.js';
import type { KernelImage } from '../nt/kernel-image.js';
import type { GuestMemory } from '../vmi/guest-memory.js';
import { SlackAllocator, type SlackBlock } from './allocator.js';
import { findSlack } from './regions.js';

/** Jumps, and operands relative to the instruction pointer, reach this far. */
const REACH = 1n << 31n;

/** Slack that the code of one image may lead to. */
export interface Slack {
  readonly freeBytes: number;
  /** @throws MemtablesError as that of `SlackAllocator` */
  allocate(size: number): SlackBlock;
  free(block: SlackBlock): void;
}

/**
 * The slack of NT and of modules. Code may lead to that of its own image and to that of images which are never
 * unloaded, as far as it is in reach: all other slack goes away with its module.
 */
export class SlackOfImages {
  readonly #allocators = new WeakMap<KernelImage, SlackAllocator>();
  readonly #takenFrom = new WeakMap<SlackBlock, SlackAllocator>();

  /** @param permanent the images that are never unloaded; their slack is used in this order */
  constructor(
    private readonly permanent: readonly [nt: KernelImage, ...others: KernelImage[]],
    private readonly memory: GuestMemory,
  ) {}

  /** What the code of `image` may lead to: NT's first, then its own. */
  for(image: KernelImage): Slack {
    const [nt, ...others] = this.permanent;
    const owners = [...new Set([nt, image, ...others])].filter((owner) => isInReach(owner, image));
    const allocators = owners.map((owner) => this.#allocatorOf(owner));
    return {
      get freeBytes() {
        return allocators.reduce((sum, { freeBytes }) => sum + freeBytes, 0);
      },
      allocate: (size) => this.#allocate(allocators, size),
      free: (block) => this.free(block),
    };
  }

  /** Makes the block's space available again. The caller has zeroed it, unless its module has been unloaded. */
  free(block: SlackBlock): void {
    (this.#takenFrom.get(block) ?? this.#allocatorOf(this.permanent[0])).free(block);
  }

  /** Size of all slack of `images`, and of what is free of it. */
  usage(images: readonly KernelImage[]): { readonly bytes: number; readonly free: number } {
    const allocators = images.map((image) => this.#allocatorOf(image));
    const sum = (sizes: readonly number[]) => sizes.reduce((total, size) => total + size, 0);
    return {
      bytes: sum(allocators.map(({ bytes }) => bytes)),
      free: sum(allocators.map(({ freeBytes }) => freeBytes)),
    };
  }

  #allocate(allocators: readonly SlackAllocator[], size: number): SlackBlock {
    let exhausted: unknown;
    for (const allocator of allocators) {
      try {
        const block = allocator.allocate(size);
        this.#takenFrom.set(block, allocator);
        return block;
      } catch (error) {
        if (!(error instanceof MemtablesError && error.code === 'SLACK_EXHAUSTED')) throw error;
        exhausted ??= error;
      }
    }
    throw exhausted;
  }

  #allocatorOf(image: KernelImage): SlackAllocator {
    let allocator = this.#allocators.get(image);
    if (allocator === undefined) {
      const read = (gva: bigint, length: number) => this.memory.readIfMapped(gva, length);
      const regions = findSlack(
        image.base,
        image.image.sections,
        (gva, length) => read(gva, length) ?? NOTHING,
      );
      allocator = new SlackAllocator(regions, read);
      this.#allocators.set(image, allocator);
    }
    return allocator;
  }
}

const NOTHING = new Uint8Array(0);

/** Whether every byte of one image can be reached from every byte of the other one. */
function isInReach(one: KernelImage, other: KernelImage): boolean {
  const [lower, upper] = one.base < other.base ? [one, other] : [other, one];
  return upper.end - lower.base <= REACH;
}

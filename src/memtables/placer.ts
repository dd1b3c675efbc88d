import { MemtablesError } from '../errors.js';
import type { HandlerLayout, HandlerPlan } from '../handlers/plan.js';
import type { SlackBlock } from '../slack/allocator.js';
import type { Slack } from '../slack/slack-of-images.js';

/** A handler with its place in slack. */
export interface PlacedHandler {
  readonly plan: HandlerPlan;
  readonly slack: SlackBlock;
  /** The loads that it replaces. */
  readonly replaces: HandlerLayout['replaces'];
}

/** Finds places in slack for the handlers of a switch. */
export class Placer {
  constructor(private readonly slack: Slack) {}

  get freeBytes(): number {
    return this.slack.freeBytes;
  }

  /** Takes slack for all of `layouts`; or for none, and says why. */
  place(layouts: readonly HandlerLayout[]): PlacedHandler[] | 'no-slack' | 'jump-out-of-range' {
    const blocks = this.#allocateAll(layouts);
    if (blocks === undefined) return 'no-slack';
    const placed = layouts.flatMap((layout, part) => {
      const slack = blocks[part]!;
      const plan = layout.at(slack.gva);
      return plan.refused === undefined ? [{ plan, slack, replaces: layout.replaces }] : [];
    });
    if (placed.length === layouts.length) return placed;
    this.#free(blocks);
    return 'jump-out-of-range';
  }

  /** Gives the slack of handlers back that were not installed. */
  release(handlers: readonly PlacedHandler[]): void {
    this.#free(handlers.map(({ slack }) => slack));
  }

  /** A block for each; none at all when one finds no room. */
  #allocateAll(layouts: readonly HandlerLayout[]): SlackBlock[] | undefined {
    const blocks: SlackBlock[] = [];
    try {
      for (const { size } of layouts) blocks.push(this.slack.allocate(size));
      return blocks;
    } catch (error) {
      this.#free(blocks);
      if (error instanceof MemtablesError && error.code === 'SLACK_EXHAUSTED') return undefined;
      throw error;
    }
  }

  #free(blocks: readonly SlackBlock[]): void {
    for (const block of blocks) this.slack.free(block);
  }
}

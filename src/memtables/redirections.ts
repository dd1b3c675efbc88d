import { MemtablesError } from '../errors.js';
import type { Evacuation } from '../handlers/evacuation.js';
import type { Patch } from '../handlers/plan.js';
import type { LiveRange } from '../safety/ranges.js';
import type { SlackBlock } from '../slack/allocator.js';
import type { Slack } from '../slack/slack-of-images.js';
import type { Gva } from '../vmi/address.js';
import type { CodeChange, Patcher } from './patcher.js';

/** Guest code to be replaced by a jump, and code of ours in slack that it leads to. */
export interface RedirectionPlan {
  readonly kind: 'relocation' | 'hook';
  /** What it is, for a person; those of one switch have it in common. */
  readonly label: string;
  readonly code: Patch;
  readonly jump: Patch;
  readonly slack: SlackBlock;
  /** The replaced code is more than one instruction: a thread may stand inside of it. */
  readonly isDivided: boolean;
  readonly evacuation?: Evacuation;
  /** A copy of the replaced load, in slack: it traps as the load did. */
  readonly fallback?: Gva;
}

/** Guest code replaced by a jump, and code of ours in slack that it leads to: a relocated load, or a hook. */
export interface Redirection {
  readonly kind: RedirectionPlan['kind'];
  readonly label: string;
  readonly at: Gva;
  /** Bytes that the jump replaces. */
  readonly length: number;
  readonly code: CodeChange;
  readonly slack: SlackBlock;
  /** Where no thread may stand while the replaced code is changed; absent where that is one instruction. */
  readonly interior: LiveRange | undefined;
  readonly fallback: Gva | undefined;
  /** How a vCPU gets out of our code; absent where it has to leave by itself. */
  evacuation: Evacuation | undefined;
  /** The jump; `undefined` once it has been taken back, so that no thread enters the code any more. */
  jump: CodeChange | undefined;
}

/** Every redirection that is in the guest. To be changed on a quiescent guest only. */
export class Redirections {
  readonly #all = new Set<Redirection>();

  constructor(
    private readonly patcher: Patcher,
    private readonly slack: Pick<Slack, 'free'>,
  ) {}

  all(): Redirection[] {
    return [...this.#all];
  }

  ofKind(kind: Redirection['kind']): Redirection[] {
    return [...this.#all].filter((redirection) => redirection.kind === kind);
  }

  /**
   * Writes the code, then the jump to it; either both are in the guest afterwards or none. The slack is given back when
   * they are taken out.
   *
   * @throws MemtablesError of the hypervisor or the journal; `ROLLBACK_FAILED` when what was written could not be
   *   taken out again: it stays in the list, disabled if that at least worked, for `remove` to try once more
   */
  install(plan: RedirectionPlan): Redirection {
    return this.installAll([plan])[0]!;
  }

  /** As `install`, for several: all of them are in the guest afterwards or none. */
  installAll(plans: readonly RedirectionPlan[]): Redirection[] {
    const redirections = plans.map((plan) => this.#prepare(plan));
    try {
      for (const { code } of redirections) this.patcher.apply(code);
      for (const { jump } of redirections) this.patcher.apply(jump!);
    } catch (error) {
      this.#rollBack(redirections, error);
      throw error;
    }
    return redirections;
  }

  #prepare({
    kind,
    label,
    code,
    jump,
    slack,
    isDivided,
    evacuation,
    fallback,
  }: RedirectionPlan): Redirection {
    const { gva: at, bytes } = jump;
    const redirection: Redirection = {
      kind,
      label,
      at,
      length: bytes.length,
      interior: isDivided ? interiorOf(at, bytes.length, label) : undefined,
      code: this.patcher.prepare(`code of ${label}`, code),
      jump: this.patcher.prepare(`jump of ${label}`, jump),
      slack,
      evacuation,
      fallback,
    };
    this.#all.add(redirection);
    return redirection;
  }

  /** The redirection whose replaced code, or code of ours, has a byte in this range. */
  overlapping(gva: Gva, length: number): Redirection | undefined {
    const end = gva + BigInt(length);
    return [...this.#all].find(
      ({ at, length: replaced, slack }) =>
        (gva < at + BigInt(replaced) && at < end) ||
        (gva < slack.gva + BigInt(slack.size) && slack.gva < end),
    );
  }

  /** Those whose replaced code has been put back: no thread enters their code any more. */
  disabled(): Redirection[] {
    return [...this.#all].filter(({ jump }) => jump === undefined);
  }

  /** Puts the replaced code back; a thread inside our code finishes normally. */
  disable(redirection: Redirection): void {
    if (redirection.jump === undefined) return;
    this.patcher.revert(redirection.jump);
    redirection.jump = undefined;
  }

  /** Whether no byte of the jump is in the guest; `disable` may have failed after that. */
  isPutBack({ jump }: Redirection): boolean {
    return jump === undefined || !this.patcher.isMade(jump);
  }

  /** Whether the guest has replaced all of our code, or of the jump to it. */
  isWhollyOverwritten({ code, jump }: Redirection): boolean {
    return [code, jump].some((change) => change !== undefined && this.patcher.isWhollyOverwritten(change));
  }

  /** Makes our code and the jump to it whole again, after the guest has written over a part. */
  reassert({ code, jump }: Redirection): void {
    this.patcher.reassert(code);
    if (jump !== undefined) this.patcher.reassert(jump);
  }

  /** Takes our code out as well. Only when no RIP and no stack leads into it. */
  remove(redirection: Redirection): void {
    this.disable(redirection);
    this.patcher.revert(redirection.code);
    this.slack.free(redirection.slack);
    this.#all.delete(redirection);
  }

  /**
   * Gives up a redirection of which the guest has unloaded a part: what it has used for something else stays as it is.
   *
   * @param isCodeLost whether our code is gone too; otherwise it stays until it is removed
   */
  abandon(redirection: Redirection, isCodeLost: boolean): void {
    if (redirection.jump !== undefined) this.patcher.revertUntouched(redirection.jump);
    redirection.jump = undefined;
    redirection.evacuation = undefined;
    if (!isCodeLost) return;
    this.patcher.revertUntouched(redirection.code);
    this.slack.free(redirection.slack);
    this.#all.delete(redirection);
  }

  /** The redirection that a change belongs to. */
  ownerOf(change: CodeChange): Redirection | undefined {
    return [...this.#all].find(({ code, jump }) => code === change || jump === change);
  }

  /** Where a live pointer must not be when our code is taken out. */
  codeRanges(redirections: Iterable<Redirection>): LiveRange[] {
    return [...redirections].map(({ label, slack }) => ({
      start: slack.gva,
      end: slack.gva + BigInt(slack.size),
      owner: label,
    }));
  }

  /** Where a live pointer must not be when replaced code is put back that is more than one instruction. */
  entryRanges(redirections: Iterable<Redirection>): LiveRange[] {
    return [...redirections].flatMap((redirection) => {
      const { interior } = redirection;
      return interior === undefined || this.isPutBack(redirection) ? [] : [interior];
    });
  }

  /** Takes out what can be taken out, whatever else fails. */
  #rollBack(redirections: readonly Redirection[], cause: unknown): void {
    const failures = redirections.flatMap((redirection) => {
      try {
        this.remove(redirection);
        return [];
      } catch (failure) {
        return [failure];
      }
    });
    if (failures.length === 0) return;
    const [{ label, at }] = redirections as [Redirection];
    const why = failures.map((failure) => (failure instanceof Error ? failure.message : String(failure)));
    throw new MemtablesError('ROLLBACK_FAILED', `${label} could not be taken back`, {
      remedy: 'The journal lists the bytes to put back; restart the guest if nothing else can.',
      context: { at, why },
      cause,
    });
  }
}

/** A range without its first byte: a thread that stands there has not begun to execute it. */
export function interiorOf(at: Gva, length: number, owner: string): LiveRange {
  return { start: at + 1n, end: at + BigInt(length), owner };
}

import type { HiddenMemory, Violation, ViolationAnswer } from '../vmi/hypervisor.js';
import * as abi from './abi.js';

/** What an event callback returns: bits of `event_response_t`, and the data that they announce. */
export interface Response {
  readonly flags: number;
  readonly data?: Uint8Array;
}

/**
 * How a hypervisor wants its events answered. KVM and Xen differ: what implements this is all that knows it.
 *
 * `ask` calls whoever handles violations, and may throw what that throws; the event is then answered with `completed`.
 */
export interface Answering {
  /** A guest with more could not be answered. */
  readonly mostVcpus: number;
  hidden: HiddenMemory | undefined;
  /** False: no answer is begun that would make this busy. */
  accepting: boolean;
  /** True from an answer that is carried out in several events until the last of them: the guest must not be paused. */
  readonly busy: boolean;
  answer(violation: TrappedAccess, ask: () => ViolationAnswer): Response;
  /** The answer that lets an access go through on what memory holds. */
  completed(violation: TrappedAccess): Response;
  /** Does without single steps, which the hypervisor does not offer; false if that is not possible. */
  doWithoutSteps(): boolean;
  /** Looks whether what is busy is through, where no event tells. Not to be called from a callback. */
  look(): void;
  /** The answer to a single step. */
  stepped(vcpu: number): Response;
  /**
   * Whether every vCPU of the paused guest has carried out what it was answered; until then it would on what memory and
   * its registers hold when it runs again.
   */
  settled(): boolean;
  /** Ends what is busy, also if the event that should have ended it never came. */
  end(): void;
}

/** A violation, with what else the event says. */
export interface TrappedAccess extends Violation {
  /** CR3 of the vCPU. */
  readonly pageTable: bigint;
}

/**
 * KVM has decoded the instruction and completes it in any case. Data is laid over what it reads by its address; a
 * read that crosses pages, or a second one, is an event of its own.
 */
export class KvmAnswering implements Answering {
  readonly mostVcpus = Number.POSITIVE_INFINITY;
  hidden: HiddenMemory | undefined;
  accepting = true;
  readonly busy = false;

  answer(_violation: TrappedAccess, ask: () => ViolationAnswer): Response {
    const data = ask();
    return data === undefined ? this.completed() : { flags: abi.RESPONSE_SET_READ_DATA, data };
  }

  completed(): Response {
    return { flags: abi.RESPONSE_NONE };
  }

  doWithoutSteps(): boolean {
    return false;
  }

  look(): void {}

  stepped(): Response {
    return { flags: abi.RESPONSE_NONE };
  }

  settled(): boolean {
    return true;
  }

  end(): void {}
}

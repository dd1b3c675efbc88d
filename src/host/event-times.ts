/** How long page-fault events wait for the tool, and the tool for them. The counts only ever grow. */
export interface EventTimesReport {
  /** Page-fault events that the tool has answered, and the time from sending each until its answer had come. */
  readonly answered: number;
  readonly turnaroundNs: number;
  /** Answers behind which the vCPU's next event was another page fault, and the time from each until that was sent. */
  readonly followed: number;
  readonly hostNs: number;
}

const NS_PER_MS = 1e6;

/** Times the page-fault events of each vCPU. */
export class EventTimes {
  private answers = 0;
  private turnaroundMs = 0;
  private follows = 0;
  private hostMs = 0;
  private readonly sentAt: number[];
  /** When each vCPU's last page fault was answered; `undefined` when something else came behind it. */
  private readonly answeredAt: (number | undefined)[];

  constructor(
    vcpuCount: number,
    /** Milliseconds. */
    private readonly now: () => number = () => performance.now(),
  ) {
    this.sentAt = new Array(vcpuCount).fill(0);
    this.answeredAt = new Array(vcpuCount).fill(undefined);
  }

  /** A page-fault event is about to be sent. */
  sent(vcpu: number): void {
    const now = this.now();
    const answeredAt = this.answeredAt[vcpu];
    if (answeredAt !== undefined) {
      this.follows++;
      this.hostMs += now - answeredAt;
    }
    this.sentAt[vcpu] = now;
  }

  /** The tool's answer to the page-fault event has come. */
  answered(vcpu: number): void {
    const now = this.now();
    this.answers++;
    this.turnaroundMs += now - this.sentAt[vcpu]!;
    this.answeredAt[vcpu] = now;
  }

  /** Something else than a page fault stops the vCPU: the time until its next one is not the host's. */
  interrupted(vcpu: number): void {
    this.answeredAt[vcpu] = undefined;
  }

  report(): EventTimesReport {
    return {
      answered: this.answers,
      turnaroundNs: Math.round(this.turnaroundMs * NS_PER_MS),
      followed: this.follows,
      hostNs: Math.round(this.hostMs * NS_PER_MS),
    };
  }
}

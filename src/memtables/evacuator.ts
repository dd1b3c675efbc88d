import { MemtablesError } from '../errors.js';
import type { Resumption, StoppedThread } from '../handlers/evacuation.js';
import { isInDebugger } from '../nt/debugger.js';
import type { Kernel } from '../nt/kernel.js';
import type { Finding, ScanResult } from '../safety/scan.js';
import { TrapFrame } from '../safety/trap-frame.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import { inUserMode } from '../x86/registers.js';
import type { Redirections } from './redirections.js';
import type { UnloadReport } from './report.js';

/**
 * Takes threads out of handlers that can be left anywhere, so that nobody has to wait for them: they go on at the site,
 * which executes the same whether it has been restored or not. To be used on a quiescent guest.
 */
export class Evacuator {
  /** By vCPU and RIP: where registers are set only as the guest resumes, the next scan may find the same again. */
  readonly #vcpus = new Set<string>();
  #canSetRegisters = true;
  #threads = 0;
  /** By place and value: what is left of a handler in the frames of threads that were moved out of it. */
  readonly #leftBehind = new Set<string>();

  constructor(
    private readonly hypervisor: Hypervisor,
    private readonly kernel: Kernel,
    private readonly redirections: Redirections,
  ) {}

  get evacuated(): UnloadReport['evacuated'] {
    return { vcpus: this.#vcpus.size, threads: this.#threads };
  }

  /**
   * Sets the registers of vCPUs that are inside. The next scan reads them anew: where the hypervisor sets them only as
   * it resumes (KVM), it is the one after that which finds them gone.
   */
  evacuateVcpus(): void {
    if (!this.#canSetRegisters) return;
    try {
      this.#setRegisters();
    } catch (error) {
      // A vCPU also leaves by itself: a hypervisor that does not set registers is no reason to give up.
      if (!(error instanceof MemtablesError) || error.code !== 'HYPERVISOR_FAILED') throw error;
      this.#canSetRegisters = false;
    }
  }

  /**
   * Changes the frames of interrupted threads that are inside; nothing, unless the scan has seen everything.
   *
   * @returns whether a frame was changed, so that the scan is out of date
   * @throws MemtablesError `HYPERVISOR_FAILED`
   */
  evacuateThreads({ findings, unsettled }: ScanResult): boolean {
    if (unsettled.length > 0 || findings.length === 0 || isInDebugger(this.kernel)) return false;
    const frames = findings.flatMap((finding) => TrapFrame.of(this.kernel, finding) ?? []);
    const strays = findings.filter(
      ({ where }) => where !== undefined && !frames.some((frame) => frame.holds(where)),
    );
    let changed = false;
    for (const frame of frames) {
      const { registers } = frame;
      // It may be from the copy that the thread gets its registers back.
      if (strays.some((stray) => stray.value === registers.rip && frame.mayBeCopiedAt(stray))) continue;
      const resumption = this.#resume(registers);
      if (resumption === undefined || !frame.change(this.hypervisor, resumption.changes)) continue;
      changed = true;
      this.#threads++;
      for (const { where, value } of findings) {
        if (where !== undefined && frame.holds(where)) this.#leftBehind.add(`${where} ${value}`);
      }
    }
    if (changed) this.hypervisor.flushCaches();
    return changed;
  }

  /** Whether a value is a register of a thread that was moved, and that the thread is about to overwrite. */
  isLeftBehind({ where, value }: Finding): boolean {
    return this.#leftBehind.has(`${where} ${value}`);
  }

  #setRegisters(): void {
    for (let vcpu = 0; vcpu < this.hypervisor.vcpuCount; vcpu++) {
      const registers = this.hypervisor.registers(vcpu);
      if (inUserMode(registers)) continue;
      const resumption = this.#resume(registers);
      if (resumption === undefined) continue;
      this.hypervisor.setRegisters(vcpu, { ...registers, ...resumption.changes });
      this.#vcpus.add(`${vcpu} ${registers.rip}`);
    }
  }

  /** How a thread goes on outside of the handler that it is in; `undefined` where it is in none, or has to stay. */
  #resume(thread: StoppedThread): Resumption | undefined {
    for (const relocation of this.redirections.ofKind('relocation')) {
      const { evacuation, interior } = relocation;
      const isAtSite = interior !== undefined && thread.rip >= interior.start && thread.rip < interior.end;
      // Where the replaced code has been put back, a thread may stand in it, at an instruction of its own.
      if (isAtSite && this.redirections.isPutBack(relocation)) continue;
      const resumption = evacuation?.evacuate(thread);
      if (resumption !== undefined) return resumption.mustWait ? undefined : resumption;
    }
    return undefined;
  }
}

import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { MemtablesError } from '../../src/errors.js';
import { Introspection, type IntrospectionObserver } from '../../src/host/introspection.js';
import { KvmiConnection } from '../../src/host/kvmi-connection.js';
import { EventId } from '../../src/host/kvmi-wire.js';
import { RunLoop } from '../../src/host/run-loop.js';
import type { Machine } from '../../src/machine/machine.js';
import { FakeMachine } from './fake-machine.js';
import { Introspector } from './introspector.js';

const SLICE = 100;
const IGNORE: IntrospectionObserver = { raised() {}, answered() {}, written() {} };

/** A tool that is attached over a real socket to a fake machine, which only runs when `turn` is called. */
export class Fixture<M extends Machine = FakeMachine> {
  private loop: RunLoop | undefined;

  private constructor(
    private readonly directory: string,
    readonly tool: Introspector,
    readonly machine: M,
    readonly introspection: Introspection,
    private readonly connection: KvmiConnection,
    /** Why we dropped a tool, in order. */
    readonly dropped: MemtablesError[],
    /** What the machine threw. */
    readonly failures: unknown[],
  ) {}

  static async attached(observer?: IntrospectionObserver): Promise<Fixture>;
  static async attached<M extends Machine>(
    observer: IntrospectionObserver | undefined,
    machine: M,
  ): Promise<Fixture<M>>;
  static async attached(observer = IGNORE, machine: Machine = new FakeMachine()): Promise<Fixture<Machine>> {
    const directory = mkdtempSync(join(tmpdir(), 'memtables-host-'));
    const path = join(directory, 'tool');
    const introspection = new Introspection(machine, observer);
    const dropped: MemtablesError[] = [];
    const failures: unknown[] = [];
    let fixture: Fixture<Machine> | undefined;
    const tool = await Introspector.listen(path);
    const accepted = tool.accept();
    const connection = new KvmiConnection({
      path,
      introspection,
      name: 'guest',
      uuid: Buffer.alloc(16, 7),
      onActivity: () => fixture?.loop?.wake(),
      onUnreachable: () => {},
      onFailure: (error) => failures.push(error),
      onState: (_attached, reason) => {
        if (reason) dropped.push(reason);
      },
    });
    await accepted;
    fixture = new Fixture(directory, tool, machine, introspection, connection, dropped, failures);
    return fixture;
  }

  /** Takes a page's permissions and asks for its violations, on every vCPU. */
  async trap(gpa: bigint, access: number): Promise<void> {
    for (let vcpu = 0; vcpu < this.machine.vcpuCount; vcpu++) await this.tool.enable(vcpu, EventId.PF);
    await this.tool.setAccess({ gpa, access });
  }

  /** Lets every vCPU that can run go through one scripted instruction. */
  turn(): void {
    this.introspection.trapped(this.machine.run(SLICE).traps);
  }

  /** From now on the vCPUs run by themselves, as in a host. */
  start(): void {
    this.loop = new RunLoop(this.machine, this.introspection, (error) => this.failures.push(error));
  }

  /** Waits until what the tool has sent so far has been carried out. */
  async sync(): Promise<void> {
    await this.tool.registers(0);
  }

  close(): void {
    this.loop?.stop();
    this.connection.close();
    this.tool.close();
    this.machine.close();
    rmSync(this.directory, { recursive: true, force: true });
  }
}

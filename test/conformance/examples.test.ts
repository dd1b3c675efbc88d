// libvmi's own example programs, which know nothing of this project, against the embedded host.
import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import { PAGE_SIZE } from '../../src/vmi/address.js';
import { Host } from '../cli/command.js';

const EXAMPLES = process.env.MEMTABLES_TEST_EXAMPLES;
if (!EXAMPLES) {
  // biome-ignore lint/suspicious/noConsole: a skip has to be seen
  console.warn(
    'SKIPPED: "libvmi’s examples" needs MEMTABLES_TEST_EXAMPLES, a folder with them built, and LD_LIBRARY_PATH for libvmi',
  );
}

const VCPUS = 2;
/** libvmi's examples find a guest by number too; with its KVM driver the first one is 1. */
const FIRST_DOMAIN = '1';

/** A running example. */
class Example {
  output = '';
  readonly ended: Promise<number | string>;
  readonly #process: ChildProcess;
  readonly #watchers = new Set<() => void>();

  constructor(name: string, args: readonly string[]) {
    // Line by line, also into a pipe.
    this.#process = spawn('stdbuf', ['-oL', join(EXAMPLES!, name), ...args], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    onTestFinished(() => {
      this.#process.kill('SIGKILL');
    });
    for (const stream of [this.#process.stdout, this.#process.stderr]) {
      stream?.setEncoding('utf8').on('data', (text) => {
        this.output += text;
        for (const look of this.#watchers) look();
      });
    }
    this.ended = new Promise((resolve, reject) => {
      this.#process.once('error', reject);
      this.#process.once('close', (code, signal) => resolve(code ?? signal ?? 'unknown'));
    });
  }

  /** Waits until it has printed what `pattern` matches this often, which it may never do before it ends. */
  async prints(pattern: RegExp, times: number): Promise<void> {
    const enough = new Promise<void>((resolve) => {
      const look = () => {
        if ([...this.output.matchAll(pattern)].length >= times) resolve();
      };
      this.#watchers.add(look);
      look();
    });
    await Promise.race([enough, this.ended]);
    this.#watchers.clear();
    expect([...this.output.matchAll(pattern)].length, this.output.slice(-2000)).toBeGreaterThanOrEqual(times);
  }

  /** As Ctrl-C does, unless it has ended by itself; returns its exit code. */
  async interrupt(): Promise<number | string> {
    this.#process.kill('SIGINT');
    return await this.ended;
  }
}

describe.runIf(EXAMPLES)('libvmi’s examples', () => {
  let host: Host;
  beforeAll(async () => {
    host = await Host.start({ vcpus: VCPUS });
  });
  afterEach(async () => {
    // libvmi leaves it behind.
    rmSync(host.socket, { force: true });
    await host.expectAsFound();
  });
  afterAll(() => host.stop());

  async function read(name: string, args: readonly string[]): Promise<string> {
    const example = new Example(name, args);
    expect([await example.ended, example.output]).toEqual([0, expect.any(String)]);
    return example.output;
  }

  test('memory events (mem-event-example): a page of the kernel that may not be executed', async () => {
    const { violations } = await host.client.statistics();
    const example = new Example('mem-event-example', ['embedded', host.socket]);
    await example.prints(/^mem_cb: at 0x[0-9a-f]+, on frame 0x[0-9a-f]+, permissions: __X$/gm, 20);
    expect(await example.interrupt()).toBe(0);
    const frame = /^Setting X memory event at RIP .*, GFN (0x[0-9a-f]+)$/m.exec(example.output)?.[1];
    const events = [...example.output.matchAll(/^mem_cb: .*on frame (0x[0-9a-f]+)/gm)];
    expect(new Set(events.map((event) => event[1]))).toEqual(new Set([frame]));
    const after = await host.client.statistics();
    expect(after.violations.execute - violations.execute).toBeGreaterThanOrEqual(events.length);
    expect(example.output).toContain('Finished with test.');
  });

  test('single step (singlestep-event-example): of every vCPU, one instruction after the other', async () => {
    const { kernelBase } = await host.client.statistics();
    const example = new Example('singlestep-event-example', ['embedded', host.socket]);
    for (let vcpu = 0; vcpu < VCPUS; vcpu++) {
      await example.prints(new RegExp(`^Single-step event: VCPU:${vcpu} `, 'gm'), 100);
    }
    expect(await example.interrupt()).toBe(0);
    const steps = [...example.output.matchAll(/^Single-step event: VCPU:0 +GFN \S+ GLA ([0-9a-f]+)$/gm)];
    const rips = steps.map((step) => BigInt(`0x${step[1]}`));
    expect(rips.some((rip) => rip >= BigInt(kernelBase))).toBe(true);
    // Most instructions do not branch: the next one is at most 15 bytes on.
    const next = rips.filter((rip, i) => i > 0 && rip > rips[i - 1]! && rip <= rips[i - 1]! + 15n);
    expect(next.length).toBeGreaterThan(rips.length / 2);
  });

  test('registers and memory (vmi-rwmem, vmi-dump-memory): CR3 leads to the kernel, whose bytes the dump holds', async () => {
    const { kernelBase } = await host.client.statistics();
    const pages = await read('vmi-rwmem', ['--domid', FIRST_DOMAIN, '--kvmi', host.socket, '--list-pages']);
    await host.expectReleased();
    const file = join(host.directory, 'dump');
    await read('vmi-dump-memory', ['-k', host.socket, 'embedded', file]);
    const dump = readFileSync(file);

    let compared = 0;
    for (const [, gva, size, gpa] of pages.matchAll(
      /(0x[0-9a-f]+) \[(0x[0-9a-f]+) .{3}\] -> (0x[0-9a-f]+)/g,
    )) {
      const rva = Number(BigInt(gva!) - BigInt(kernelBase));
      if (rva < 0 || rva >= host.image.length) continue;
      expect(Number(size)).toBe(PAGE_SIZE);
      const expected = host.image.subarray(rva, rva + PAGE_SIZE);
      // What a guest may change is zero in the host's snapshot.
      if (expected.every((byte) => byte === 0)) continue;
      expect(dump.subarray(Number(gpa), Number(gpa) + PAGE_SIZE).equals(expected)).toBe(true);
      compared++;
    }
    // Headers and code, at least.
    expect(compared).toBeGreaterThan(8);
  });

  test.each([
    'cr3-event-example',
    'msr-event-example',
    'interrupt-event-example',
    'descriptor-event-example',
  ])(
    '%s asks for events that the embedded host does not have: it is told so, and the guest goes on',
    async (name) => {
      const example = new Example(name, ['embedded', host.socket]);
      await example.prints(/Operation not supported/g, 1);
      await example.interrupt();
    },
  );
});

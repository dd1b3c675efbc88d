import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { expect, onTestFinished } from 'vitest';
import { type HostStatistics, StatisticsClient } from '../../src/host/statistics-client.js';

export const CLI = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url));
export const PROFILE = fileURLToPath(new URL('../../build/guest/ntoskrnl.json', import.meta.url));
export const IMAGE = fileURLToPath(new URL('../../build/guest/ntoskrnl.exe', import.meta.url));
const POLL_MS = 20;

if (!existsSync(CLI)) throw new Error('the command line is not built: run `npm run setup`');

/** A running `memtables`. */
export class Command {
  stdout = '';
  stderr = '';
  /** Its exit code, or the signal that killed it. */
  readonly ended: Promise<number | string>;
  readonly process: ChildProcess;
  #over = false;

  /**
   * @param before what a shell does first, in the same process
   * @param program another than `memtables`
   */
  constructor(
    args: readonly string[],
    env: Readonly<Record<string, string>> = {},
    before = ':',
    program = CLI,
  ) {
    const command = [process.execPath, program, ...args];
    this.process = spawn('bash', ['-c', `${before}; exec "$@"`, 'bash', ...command], {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...env },
    });
    this.process.stdout?.setEncoding('utf8').on('data', (text) => {
      this.stdout += text;
    });
    this.process.stderr?.setEncoding('utf8').on('data', (text) => {
      this.stderr += text;
    });
    this.ended = new Promise((resolve) => {
      this.process.once('close', (code, signal) => {
        this.#over = true;
        resolve(code ?? signal ?? 'unknown');
      });
    });
  }

  kill(signal: NodeJS.Signals): void {
    this.process.kill(signal);
  }

  /** Waits until `text` has been printed. */
  async prints(text: string, where: 'stdout' | 'stderr' = 'stdout'): Promise<void> {
    while (!this[where].includes(text)) {
      if (this.#over) throw new Error(`it ended without printing ${text}:\n${this.stdout}\n${this.stderr}`);
      await sleep(POLL_MS);
    }
  }

  /** Every line of stdout, as JSON. */
  get records(): Record<string, unknown>[] {
    return this.stdout
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line));
  }
}

/** Runs a command, and ends it with the test. */
export function start(
  args: readonly string[],
  env?: Readonly<Record<string, string>>,
  before?: string,
): Command {
  const command = new Command(args, env, before);
  onTestFinished(() => command.kill('SIGKILL'));
  return command;
}

export interface Ended {
  readonly code: number | string;
  readonly stdout: string;
  readonly stderr: string;
}

export async function run(
  args: readonly string[],
  env?: Readonly<Record<string, string>>,
  before?: string,
): Promise<Ended> {
  const command = start(args, env, before);
  const code = await command.ended;
  return { code, stdout: command.stdout, stderr: command.stderr };
}

export function temporaryDirectory(): string {
  return mkdtempSync(join(tmpdir(), 'memtables-test-'));
}

/** `memtables host`, and what it looked like before anybody attached. */
export class Host {
  private constructor(
    readonly command: Command,
    readonly directory: string,
    readonly client: StatisticsClient,
    readonly image: Buffer,
  ) {}

  static async start({ seed = 5, vcpus = 2 } = {}): Promise<Host> {
    const directory = temporaryDirectory();
    const socket = join(directory, 'kvmi');
    const command = new Command(['host', '--socket', socket, '--seed', `${seed}`, '--vcpus', `${vcpus}`]);
    let client: StatisticsClient | undefined;
    for (;;) {
      client ??= await StatisticsClient.connect(`${socket}.stats`).catch(() => undefined);
      const statistics = await client?.statistics();
      if (client && (statistics?.guest?.integritySweeps ?? 0) > 0) break;
      if (command.process.exitCode !== null) throw new Error(`no host: ${command.stderr}`);
      await sleep(POLL_MS);
    }
    return new Host(command, directory, client, await client.image());
  }

  get socket(): string {
    return join(this.directory, 'kvmi');
  }

  get journal(): string {
    return `${this.socket}.journal`;
  }

  /** Arguments that attach to it. */
  attach(...more: readonly string[]): string[] {
    return ['attach', '-n', 'embedded', '-s', this.socket, '-j', PROFILE, ...more];
  }

  async until(condition: (statistics: HostStatistics) => boolean): Promise<HostStatistics> {
    for (;;) {
      const statistics = await this.client.statistics();
      if (condition(statistics)) return statistics;
      await sleep(POLL_MS);
    }
  }

  /** Waits until no tool is attached, then compares the guest with what it was. */
  async expectAsFound(): Promise<void> {
    const statistics = await this.expectReleased();
    expect(this.image.equals(await this.client.image())).toBe(true);
    expect(statistics.guest).toMatchObject({ integrityMismatches: 0, userErrors: 0 });
    expect(existsSync(this.journal)).toBe(false);
    expect(existsSync(this.socket)).toBe(false);
  }

  /** Waits until no tool is attached: nothing is trapped, held or paused then, and the guest runs. */
  async expectReleased(): Promise<HostStatistics> {
    const statistics = await this.until(({ attached }) => !attached);
    expect(statistics).toMatchObject({ restrictedFrames: 0, outstandingEvents: 0 });
    expect(statistics.paused).not.toContain(true);
    expect(statistics.guest?.bugCheck).toBeUndefined();
    const switches = statistics.guest?.switches['one-level'] ?? 0;
    await this.until(({ guest }) => (guest?.switches['one-level'] ?? 0) > switches);
    return statistics;
  }

  async stop(): Promise<void> {
    this.client.close();
    this.command.kill('SIGKILL');
    await this.command.ended;
    rmSync(this.directory, { recursive: true, force: true });
  }
}

import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { type PeerOptions, ScriptedPeer } from './peer.js';

const PROGRAM = 'build/Release/kvmi-abi-check';
export const BUNDLED = 'build/Release/kvmi.so';

const INIT_DOMAINNAME = 1;
const INIT_EVENTS = 4;
const KVM = 1;

/** What one command printed: its own line without the `= name `, and the lines of the callbacks before it. */
export interface Outcome {
  readonly result: string;
  readonly events: readonly string[];
}

/** A C program that uses a library, told line by line what to do. */
export class Program {
  stderr = '';
  /** How it ended: an exit code, or the signal that killed it. */
  readonly ended: Promise<number | string>;
  private readonly directory = mkdtempSync(join(tmpdir(), 'kvmi-'));
  readonly socketPath = join(this.directory, 'socket');
  private readonly child: ChildProcessWithoutNullStreams;
  private readonly pending: { resolve: (outcome: Outcome) => void; reject: (error: Error) => void }[] = [];
  private events: string[] = [];

  constructor(library: string) {
    if (!existsSync(PROGRAM)) throw new Error(`${PROGRAM} is missing: run npm run setup`);
    this.child = spawn(PROGRAM, [library]);
    this.child.stdin.on('error', () => {});
    this.child.stderr.on('data', (text) => {
      this.stderr += text;
    });
    createInterface(this.child.stdout).on('line', (line) => this.take(line));
    this.ended = new Promise((resolve) => {
      this.child.on('close', (code, signal) => {
        for (const { reject } of this.pending)
          reject(new Error(`it ended (${code ?? signal}): ${this.stderr}`));
        resolve(code ?? signal ?? 'unknown');
      });
    });
  }

  get pid(): number {
    return this.child.pid!;
  }

  run(command: string): Promise<Outcome> {
    return new Promise((resolve, reject) => {
      this.pending.push({ resolve, reject });
      this.child.stdin.write(`${command}\n`);
    });
  }

  async result(command: string): Promise<string> {
    return (await this.run(command)).result;
  }

  init(flags = INIT_DOMAINNAME | INIT_EVENTS, path = this.socketPath, mode = KVM): Promise<string> {
    return this.result(`init ${path} ${flags} ${mode}`);
  }

  /** Lets it finish and returns how it ended. */
  async end(): Promise<number | string> {
    this.child.stdin.end();
    const ended = await this.ended;
    rmSync(this.directory, { recursive: true, force: true });
    return ended;
  }

  private take(line: string): void {
    if (!line.startsWith('= ')) {
      this.events.push(line);
      return;
    }
    const outcome = { result: line.replace(/^= \S+ ?/, ''), events: this.events };
    this.events = [];
    this.pending.shift()?.resolve(outcome);
  }
}

export interface Attached {
  readonly program: Program;
  readonly peer: ScriptedPeer;
}

/** A program that has attached to a scripted peer. */
export async function attach(library: string, options: PeerOptions = {}): Promise<Attached> {
  const program = new Program(library);
  const [status, peer] = await Promise.all([
    program.init(),
    ScriptedPeer.connect(program.socketPath, options),
  ]);
  if (status !== '0 error=0') throw new Error(`attach: ${status}: ${program.stderr}`);
  return { program, peer };
}

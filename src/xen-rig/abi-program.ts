import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { createInterface } from 'node:readline';

/** What one command printed: its own line without the `= name `, and the lines of the callbacks before it. */
export interface Outcome {
  readonly result: string;
  readonly events: readonly string[];
}

/** A C program (native/vmi/test/abi_check.c) that uses a library with libvmi's C ABI, told line by line what to do. */
export class AbiProgram {
  stderr = '';
  /** How it ended: an exit code, or the signal that killed it. */
  readonly ended: Promise<number | string>;
  readonly #child: ChildProcessWithoutNullStreams;
  readonly #pending: { resolve: (outcome: Outcome) => void; reject: (error: Error) => void }[] = [];
  #events: string[] = [];

  constructor(program: string, library: string) {
    this.#child = spawn(program, [library]);
    this.#child.stdin.on('error', () => {});
    this.#child.stderr.on('data', (text) => {
      this.stderr += text;
    });
    createInterface(this.#child.stdout).on('line', (line) => this.#take(line));
    this.ended = new Promise((resolve) => {
      const end = (how: number | string) => {
        for (const { reject } of this.#pending) reject(new Error(`it ended (${how}): ${this.stderr}`));
        resolve(how);
      };
      this.#child.on('error', (error) => end(error.message));
      this.#child.on('close', (code, signal) => end(code ?? signal ?? 'unknown'));
    });
  }

  get pid(): number {
    return this.#child.pid!;
  }

  run(command: string): Promise<Outcome> {
    return new Promise((resolve, reject) => {
      this.#pending.push({ resolve, reject });
      this.#child.stdin.write(`${command}\n`);
    });
  }

  async result(command: string): Promise<string> {
    return (await this.run(command)).result;
  }

  /** Lets it finish and returns how it ended. */
  async end(): Promise<number | string> {
    this.#child.stdin.end();
    return await this.ended;
  }

  /** Kills it, as it stands, and returns how it ended. */
  async kill(): Promise<number | string> {
    this.#child.kill('SIGKILL');
    return await this.ended;
  }

  #take(line: string): void {
    if (!line.startsWith('= ')) {
      this.#events.push(line);
      return;
    }
    const outcome = { result: line.replace(/^= \S+ ?/, ''), events: this.#events };
    this.#events = [];
    this.#pending.shift()?.resolve(outcome);
  }
}

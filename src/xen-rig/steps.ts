import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

export interface Step {
  readonly name: string;
  /** What it does, in words, for who waits for it. */
  readonly what: string;
  /** Files and folders that it reads. */
  readonly inputs: readonly string[];
  /** What else it depends on. */
  readonly salt: string;
  readonly outputs: readonly string[];
  run(): void;
}

/** Steps that fill a folder; one is skipped when nothing it depends on has changed since it last succeeded. */
export class Steps {
  readonly #stamps: string;

  constructor(
    folder: string,
    private readonly say: (message: string) => void,
  ) {
    this.#stamps = join(folder, 'stamps.json');
  }

  ensure(step: Step): void {
    const stamp = digest(step.inputs, step.salt);
    const stamps = this.#load();
    if (stamps[step.name] === stamp && step.outputs.every((path) => existsSync(path))) return;
    this.say(step.what);
    // Until it has succeeded again, what the last success left behind does not count.
    delete stamps[step.name];
    this.#save(stamps);
    step.run();
    this.#save({ ...stamps, [step.name]: stamp });
  }

  #load(): Record<string, string> {
    try {
      return JSON.parse(readFileSync(this.#stamps, 'utf8'));
    } catch {
      return {};
    }
  }

  #save(stamps: Record<string, string>): void {
    writeFileSync(this.#stamps, `${JSON.stringify(stamps, null, 2)}\n`);
  }
}

function digest(inputs: readonly string[], salt: string): string {
  const hash = createHash('sha256').update(salt);
  for (const file of inputs.flatMap(filesBelow)) hash.update(`\0${file}\0`).update(readFileSync(file));
  return hash.digest('hex');
}

function filesBelow(path: string): string[] {
  if (statSync(path).isFile()) return [path];
  return readdirSync(path)
    .sort()
    .flatMap((name) => filesBelow(join(path, name)));
}

import { closeSync, openSync, readSync } from 'node:fs';

const CHUNK_BYTES = 64 * 1024;

/** The lines of a file that somebody else is still writing. */
export class GrowingFile {
  readonly #fd: number;
  #position = 0;
  #rest = '';

  constructor(path: string) {
    this.#fd = openSync(path, 'r');
  }

  /** The lines that have been completed since the last call. */
  newLines(): string[] {
    const chunk = Buffer.alloc(CHUNK_BYTES);
    for (;;) {
      const bytes = readSync(this.#fd, chunk, 0, chunk.length, this.#position);
      if (bytes === 0) break;
      this.#position += bytes;
      // Serial lines end with a carriage return before the line feed, or behind it.
      this.#rest += chunk.toString('latin1', 0, bytes).replaceAll('\r', '');
    }
    const lines = this.#rest.split('\n');
    this.#rest = lines.pop()!;
    return lines;
  }

  close(): void {
    closeSync(this.#fd);
  }
}

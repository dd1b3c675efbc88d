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
      // Of the escape sequences and the odd byte of a serial line nothing has to be understood.
      this.#rest += chunk.toString('latin1', 0, bytes);
    }
    const lines = this.#rest.split(/\r*\n/);
    this.#rest = lines.pop()!;
    return lines;
  }

  close(): void {
    closeSync(this.#fd);
  }
}

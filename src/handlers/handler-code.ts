import type { Gva } from '../vmi/address.js';
import { INT3 } from './encoding.js';
import type { Exit } from './evacuation.js';
import { encodeJump, encodeShortJump } from './jump.js';

/** The code of a handler at its place, with the way out of it in front of each instruction. */
export class HandlerCode {
  readonly exits = new Map<Gva, Exit>();
  readonly #bytes: Buffer;
  #inReach = true;

  /** Bytes that are not written to are never executed. */
  constructor(
    private readonly start: Gva,
    size: number,
  ) {
    this.#bytes = Buffer.alloc(size, INT3);
  }

  /** All of it; `undefined` when something in it cannot be reached. */
  get bytes(): Buffer | undefined {
    return this.#inReach ? this.#bytes : undefined;
  }

  /** Puts an instruction at `at`, `undefined` where it cannot reach what it has to; returns where it ends. */
  put(at: Gva, code: ArrayLike<number> | undefined, exit: Exit): Gva {
    if (code === undefined) {
      this.#inReach = false;
      return at;
    }
    this.exits.set(at, exit);
    this.#bytes.set(code, Number(at - this.start));
    return at + BigInt(code.length);
  }

  jump(at: Gva, target: Gva, exit: Exit): Gva {
    return this.put(at, encodeJump(at, target), exit);
  }

  shortJump(at: Gva, target: Gva, exit: Exit): Gva {
    return this.put(at, encodeShortJump(at, target), exit);
  }
}

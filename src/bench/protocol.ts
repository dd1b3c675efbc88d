import type { PortableError } from '../attachment/protocol.js';
import type { Gfn } from '../vmi/address.js';

export interface ListenerOptions {
  readonly name: string;
  readonly socket: string;
  readonly library: string;
  readonly profile: string;
  readonly journal: string;
  /** Functions to hook, as `nt!Name`. */
  readonly hooks: readonly string[];
  /** Two doubles, see `HandlerTime`. */
  readonly handlerTime: SharedArrayBuffer;
}

export type ListenerCommand =
  /** Attach the engine, and have it hook the functions. */
  | { readonly type: 'engine' }
  /** Attach the binding alone, with a handler that has every access completed on guest memory. */
  | { readonly type: 'binding'; readonly frames: readonly Gfn[] }
  | { readonly type: 'detach' };

export type ListenerMessage =
  | { readonly type: 'listening'; readonly frames: readonly Gfn[] }
  | { readonly type: 'detached' }
  | { readonly type: 'failed'; readonly error: PortableError };

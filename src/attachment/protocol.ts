import { type ErrorCode, type ErrorContext, MemtablesError } from '../errors.js';
import type { HandlerChoice } from '../handlers/planner.js';
import type { EngineEvent, LoadCounts, Statistics, UnloadReport } from '../memtables/report.js';
import type { Gva } from '../vmi/address.js';

/** What the worker needs to attach: plain data, it crosses to another thread. */
export interface WorkerOptions {
  readonly name: string;
  readonly socket: string | undefined;
  readonly profile: string;
  readonly library: string | undefined;
  readonly threshold: number;
  readonly handler: HandlerChoice;
  readonly relocate: boolean;
  readonly ahead: boolean;
  readonly journal: string;
  readonly unloadSeconds: number;
  /** The heartbeat of the native calls, see `src/libvmi/watchdog.ts`. */
  readonly heartbeat: SharedArrayBuffer;
}

export interface AttachedKernel {
  readonly base: Gva;
  readonly size: number;
  readonly pdb: string;
  readonly vcpus: number;
  /** Loaded kernel modules besides NT. */
  readonly modules: number;
  /** The path of the library that it is attached through. */
  readonly library: string;
}

/** What the main thread asks of the worker. */
export type Command =
  | { readonly type: 'hook'; readonly name: string }
  | { readonly type: 'relocate'; readonly enabled: boolean }
  | { readonly type: 'statistics' }
  | { readonly type: 'loads' }
  | { readonly type: 'unload' };

export interface Request {
  readonly id: number;
  readonly command: Command;
}

/** What each command is answered with. */
export interface Answers {
  hook: undefined;
  relocate: undefined;
  statistics: Statistics;
  loads: readonly LoadCounts[];
  unload: UnloadReport;
}

export type WorkerMessage =
  /** It is about to wait for the hypervisor on a socket that is its own. */
  | { readonly type: 'connecting' }
  | { readonly type: 'connected' }
  | { readonly type: 'attached'; readonly kernel: AttachedKernel }
  | { readonly type: 'answer'; readonly id: number; readonly value: Answers[keyof Answers] }
  | { readonly type: 'refusal'; readonly id: number; readonly error: PortableError }
  | { readonly type: 'event'; readonly event: EngineEvent }
  /** The worker is about to end: cleanly, or because of an error. */
  | { readonly type: 'ended'; readonly error?: PortableError };

/** An error as it crosses between threads: structured cloning would lose its class and fields. */
export interface PortableError {
  readonly code: ErrorCode | undefined;
  readonly message: string;
  readonly remedy: string;
  readonly context: Readonly<Record<string, unknown>>;
  readonly stack: string | undefined;
  readonly cause: PortableError | undefined;
}

export function toPortable(error: unknown): PortableError {
  const known = error instanceof Error ? error : new Error(String(error));
  const { code, remedy, context } =
    known instanceof MemtablesError ? known : { code: undefined, remedy: '', context: {} };
  return {
    code,
    message: known.message,
    remedy,
    context: cloneable(context),
    stack: known.stack,
    cause: known.cause === undefined ? undefined : toPortable(known.cause),
  };
}

/** What cannot cross is told by its text: the error itself must not get lost. */
function cloneable(context: ErrorContext): ErrorContext {
  try {
    return structuredClone(context);
  } catch {
    return Object.fromEntries(Object.entries(context).map(([name, value]) => [name, String(value)]));
  }
}

export function fromPortable(portable: PortableError): Error {
  const { code, message, remedy, context, stack } = portable;
  const cause = portable.cause && { cause: fromPortable(portable.cause) };
  const error =
    code === undefined
      ? new Error(message, cause)
      : new MemtablesError(code, message, { remedy, context, ...cause });
  if (stack !== undefined) error.stack = stack;
  return error;
}

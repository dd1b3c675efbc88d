import type { PortableError } from '../attachment/protocol.js';

/** What dom0 has to do: the main job, or the checks of the library. */
export interface Dom0Job {
  /** The path in dom0 of the library to attach through. */
  readonly library: string;
  readonly conformance: boolean;
  readonly seed: number;
  readonly hooks: readonly string[];
  readonly vcpus: number;
  readonly memoryMB: number;
  /** Length of each phase. */
  readonly seconds: number;
  /** A load is relocated once it has trapped more often than this. */
  readonly threshold: number;
}

/** A line of what the program in dom0 reports. */
export type Dom0Line =
  /** How far it has come. */
  | { readonly type: 'stage'; readonly text: string }
  /** A result as a record for a program, and as text for a person. */
  | { readonly type: 'result'; readonly record: object; readonly text?: string }
  | { readonly type: 'error'; readonly error: PortableError }
  /** The last line of a run that came to its end: what it had to show and did not. */
  | { readonly type: 'judged'; readonly shortcomings: readonly string[] };

/** The forms of a switch that a run has to relocate one of at least. */
export const REQUIRED_FORMS = ['one-level', 'two-level'] as const;

import { MemtablesError } from '../../src/errors.js';
import type { Hypervisor } from '../../src/vmi/hypervisor.js';

/**
 * The calls that can fail: all that change something or ask the guest. `resume` and `flushCaches` fail only when the
 * hypervisor is gone, and nothing can be restored.
 */
const FALLIBLE = [
  'readPhysical',
  'writePhysical',
  'translate',
  'registers',
  'pause',
  'trapAccess',
  'releaseAccess',
  'listen',
] as const satisfies readonly (keyof Hypervisor)[];

type Fallible = (typeof FALLIBLE)[number];

/** Those that change the guest. */
const CHANGES: readonly string[] = ['writePhysical', 'trapAccess', 'releaseAccess'];

export interface FailingHypervisor {
  readonly hypervisor: Hypervisor;
  /** The calls made so far, in order. */
  readonly log: Fallible[];
  /** Makes the n-th call from now fail, and then the n-th after each failure; nothing for none. */
  failAt(...ns: number[]): void;
  /** As `failAt`, counting only calls that change the guest. */
  failAtChange(n: number): void;
  /** False while a failure has not happened yet. */
  readonly failed: boolean;
}

/** Passes calls on, logs them, and fails one of them. */
export function failingHypervisor(inner: Hypervisor): FailingHypervisor {
  const log: Fallible[] = [];
  let left: number[] = [];
  let changesOnly = false;
  const hypervisor = new Proxy(inner, {
    get(target, property) {
      const value = Reflect.get(target, property);
      if (typeof value !== 'function') return value;
      if (!FALLIBLE.includes(property as Fallible)) return value.bind(target);
      return (...args: unknown[]) => {
        log.push(property as Fallible);
        const counts = !changesOnly || CHANGES.includes(String(property));
        if (counts && left.length > 0 && --left[0]! === 0) {
          left.shift();
          throw new MemtablesError('HYPERVISOR_FAILED', `${String(property)} failed on purpose`, {
            remedy: 'This is a test.',
          });
        }
        return value.apply(target, args);
      };
    },
  });
  return {
    hypervisor,
    log,
    failAt(...ns) {
      left = ns;
      changesOnly = false;
    },
    failAtChange(n) {
      left = [n];
      changesOnly = true;
    },
    get failed() {
      return left.length === 0;
    },
  };
}

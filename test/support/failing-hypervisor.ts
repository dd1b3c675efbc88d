import { MemtablesError } from '../../src/errors.js';
import type { Hypervisor } from '../../src/vmi/hypervisor.js';

/** The calls that can fail: all that change something or ask the guest. */
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

export interface FailingHypervisor {
  readonly hypervisor: Hypervisor;
  /** The calls made so far, in order. */
  readonly log: Fallible[];
  /** Makes the n-th call from now fail, once; 0 for none. */
  failAt(n: number): void;
  /** False while the failure has not happened yet. */
  readonly failed: boolean;
}

/** Passes calls on, logs them, and fails one of them. */
export function failingHypervisor(inner: Hypervisor): FailingHypervisor {
  const log: Fallible[] = [];
  let left = 0;
  const hypervisor = new Proxy(inner, {
    get(target, property) {
      const value = Reflect.get(target, property);
      if (typeof value !== 'function') return value;
      if (!FALLIBLE.includes(property as Fallible)) return value.bind(target);
      return (...args: unknown[]) => {
        log.push(property as Fallible);
        if (left > 0 && --left === 0) {
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
    failAt(n) {
      left = n;
    },
    get failed() {
      return left === 0;
    },
  };
}

import { fileURLToPath } from 'node:url';
import koffi, { type LibraryHandle } from 'koffi';
import { MemtablesError } from '../errors.js';
import { EVENTS_VERSION, FUNCTION_NAMES, type FunctionName, SIGNATURES } from './abi.js';

export type Argument = number | bigint | string | ArrayBufferView | null;
type NativeFunction = (...args: readonly Argument[]) => number | bigint;

/** A loaded library with libvmi's C ABI. */
export interface Libvmi {
  readonly path: string;
  readonly functions: Readonly<Record<FunctionName, NativeFunction>>;
}

export const LIBRARY_VARIABLE = 'MEMTABLES_LIBVMI';

/** Where the build leaves the bundled library; the same from `src/` and from `dist/`. */
const BUNDLED_LIBRARY = fileURLToPath(new URL('../../build/Release/kvmi.so', import.meta.url));

/**
 * Loads a library with libvmi's C ABI: the one at `path`, else the one that `MEMTABLES_LIBVMI` names, else the
 * bundled one. A path without a slash is looked up as the dynamic linker does.
 *
 * @throws MemtablesError `LIBRARY_NOT_LOADED` when it cannot be loaded, `LIBRARY_INCOMPATIBLE` when it has
 * another event layout or lacks a function.
 */
export function loadLibvmi(path: string | undefined): Libvmi {
  const chosen = path ?? (process.env[LIBRARY_VARIABLE] || BUNDLED_LIBRARY);
  const library = open(chosen);
  const missing: FunctionName[] = [];
  const functions = {} as Record<FunctionName, NativeFunction>;
  for (const name of FUNCTION_NAMES) {
    const [result, parameters] = SIGNATURES[name];
    try {
      functions[name] = library.func(name, result, [...parameters]);
    } catch {
      missing.push(name);
    }
  }
  // The version first: another libvmi may well lack functions, and its version says more than their names.
  if (!missing.includes('vmi_events_version')) checkVersion(chosen, functions.vmi_events_version());
  if (missing.length > 0) {
    throw new MemtablesError('LIBRARY_INCOMPATIBLE', `${chosen} lacks functions of libvmi`, {
      remedy: 'Name a libvmi 0.15 that was built with its KVM driver and events, or use the bundled library.',
      context: { path: chosen, missing },
    });
  }
  return { path: chosen, functions };
}

function open(path: string): LibraryHandle {
  try {
    return koffi.load(path);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new MemtablesError('LIBRARY_NOT_LOADED', `${path} could not be loaded: ${reason}`, {
      remedy:
        path === BUNDLED_LIBRARY
          ? 'Run `npm run setup`, which builds it.'
          : `Check --libvmi and ${LIBRARY_VARIABLE}${orHere(path)}, and that the libraries it needs can be found (ldd).`,
      context: { path },
      cause,
    });
  }
}

/** The dynamic linker looks such a name up in its own folders only. */
function orHere(path: string): string {
  return path.includes('/') ? '' : ` (a file in this folder is ./${path})`;
}

function checkVersion(path: string, version: number | bigint): void {
  if (version === EVENTS_VERSION) return;
  throw new MemtablesError(
    'LIBRARY_INCOMPATIBLE',
    `${path} has version ${version} of libvmi's events; only version ${EVENTS_VERSION} is known`,
    {
      remedy: 'Name a libvmi 0.15, or use the bundled library.',
      context: { path, version, expected: EVENTS_VERSION },
    },
  );
}

import { existsSync } from 'node:fs';
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

/** A library that was looked at, and why it is not used. */
export interface Candidate {
  readonly path: string;
  readonly reason: string;
}

export const LIBRARY_VARIABLE = 'MEMTABLES_LIBVMI';

type HypervisorName = 'kvm' | 'xen';

/** Where the build leaves the bundled libraries; the same from `src/` and from `dist/`. */
const BUNDLED_LIBRARIES: Readonly<Record<HypervisorName, string>> = {
  kvm: fileURLToPath(new URL('../../build/Release/kvmi.so', import.meta.url)),
  xen: fileURLToPath(new URL('../../build/Release/xen.so', import.meta.url)),
};

/** Looked up by the dynamic linker: libvmi's SONAME, then the name that only a package for developers installs. */
const INSTALLED_LIBRARIES = ['libvmi.so.0', 'libvmi.so'];

/**
 * Loads a library with libvmi's C ABI: the one at `path` and no other, else the one that `MEMTABLES_LIBVMI` names and
 * no other, else the first that can be used of the bundled one for this hypervisor and an installed libvmi. A path
 * without a slash is looked up as the dynamic linker does.
 *
 * @throws MemtablesError `LIBRARY_NOT_LOADED` when there is none, `LIBRARY_INCOMPATIBLE` when the one that was named
 * has another event layout or lacks a function; `context.candidates` tells of each that was looked at
 */
export function loadLibvmi(path: string | undefined, hypervisor: HypervisorName = 'kvm'): Libvmi {
  const named = path ?? (process.env[LIBRARY_VARIABLE] || undefined);
  const paths = named === undefined ? [BUNDLED_LIBRARIES[hypervisor], ...INSTALLED_LIBRARIES] : [named];
  const candidates: Candidate[] = [];
  let loaded = false;
  for (const candidate of paths) {
    const result = tryToLoad(candidate);
    if ('functions' in result) return { path: candidate, functions: result.functions };
    candidates.push({ path: candidate, reason: result.reason });
    loaded = result.loaded;
  }
  throw new MemtablesError(
    loaded && named ? 'LIBRARY_INCOMPATIBLE' : 'LIBRARY_NOT_LOADED',
    inWords(candidates),
    {
      remedy: named === undefined ? whereToGetOne(hypervisor) : whatToCheck(named, loaded, hypervisor),
      context: { candidates },
    },
  );
}

function whereToGetOne(hypervisor: HypervisorName): string {
  if (existsSync(BUNDLED_LIBRARIES[hypervisor])) {
    return (
      `Install the libraries that the bundled one needs (ldd ${BUNDLED_LIBRARIES[hypervisor]} names them), or tell the ` +
      `dynamic linker where they are (LD_LIBRARY_PATH); or name ${needed(hypervisor)}, with --libvmi or ${LIBRARY_VARIABLE}.`
    );
  }
  const where = { kvm: '', xen: ' where libxen-dev is installed' }[hypervisor];
  return `Run \`npm run setup\`, which builds the bundled one${where}, or install ${needed(hypervisor)}, where the dynamic linker finds it, or name it with --libvmi or ${LIBRARY_VARIABLE}.`;
}

function whatToCheck(path: string, loaded: boolean, hypervisor: HypervisorName): string {
  if (loaded) return `Name ${needed(hypervisor)}, or none.`;
  return (
    `Check --libvmi and ${LIBRARY_VARIABLE}${orHere(path)}, and that the libraries it needs can be found (ldd); ` +
    `needed is ${needed(hypervisor)}.`
  );
}

function needed(hypervisor: HypervisorName): string {
  const driver = { kvm: 'KVM', xen: 'Xen' }[hypervisor];
  return `libvmi 0.15 (events version ${EVENTS_VERSION}), built with its ${driver} driver and events`;
}

/** The dynamic linker looks such a name up in its own folders only. */
function orHere(path: string): string {
  return path.includes('/') ? '' : ` (a file in this folder is ./${path})`;
}

type Loading =
  | { readonly functions: Libvmi['functions'] }
  | { readonly loaded: boolean; readonly reason: string };

function tryToLoad(path: string): Loading {
  let library: LibraryHandle;
  try {
    library = koffi.load(path);
  } catch (error) {
    return { loaded: false, reason: `could not be loaded: ${(error as Error).message}` };
  }
  const functions = {} as Record<FunctionName, NativeFunction>;
  const missing: FunctionName[] = [];
  const find = (name: FunctionName) => {
    const [result, parameters] = SIGNATURES[name];
    try {
      functions[name] = library.func(name, result, [...parameters]);
    } catch {
      missing.push(name);
    }
  };
  // The version first: another libvmi may well lack functions, and its version says more than their names.
  find('vmi_events_version');
  const version = functions.vmi_events_version?.() ?? EVENTS_VERSION;
  if (version !== EVENTS_VERSION) {
    const reason = `has version ${version} of libvmi's events; only version ${EVENTS_VERSION} is known`;
    return { loaded: true, reason };
  }
  for (const name of FUNCTION_NAMES) if (name !== 'vmi_events_version') find(name);
  if (missing.length > 0) return { loaded: true, reason: `lacks functions of libvmi: ${missing.join(', ')}` };
  return { functions };
}

function inWords(candidates: readonly Candidate[]): string {
  const lines = candidates.map(({ path, reason }) => `${path} ${reason}`);
  return lines.length === 1
    ? lines[0]!
    : ["no library with libvmi's C ABI can be used:", ...lines].join('\n  ');
}

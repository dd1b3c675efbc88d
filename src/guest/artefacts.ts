import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { MemtablesError } from '../errors.js';
import type { GprName } from '../x86/registers.js';
import { type GuestModule, readGuestModule } from './lexer-module.js';

/** What kind of load a switch site of the guest is; its own counters are kept by the same names. */
export type SwitchForm = 'one-level' | 'two-level' | 'look-alike' | 'lexer';

/** Why a look-alike must be left alone. The engine has words of its own; these name the hazard. */
export type RefusalHazard =
  | 'not-a-switch'
  | 'system-service-table'
  | 'not-a-mov'
  | 'three-operands'
  | 'destination-is-memory'
  | 'no-index'
  | 'address-size-prefix'
  | 'operand-size'
  | 'scale'
  | 'too-short'
  | 'base-is-not-the-image'
  | 'table-outside-code'
  | 'pageable'
  | 'discardable'
  | 'initkdbg'
  | 'kvascode';

/** One table load of an image of the guest. RVAs are relative to the image base. */
export interface SwitchSite {
  readonly name: string;
  readonly form: SwitchForm;
  readonly function: string;
  readonly functionRva: number;
  readonly section: string;
  /** The dword load `mov dst, [base + idx*4 + tableRva]`. */
  readonly loadRva: number;
  readonly tableRva: number;
  readonly entries: number;
  readonly base: GprName;
  readonly idx: GprName;
  readonly dst: GprName;
  /** The byte load `movzx idx, byte ptr [base + byteIdx + byteTableRva]` of a two-level switch. */
  readonly byteLoadRva?: number;
  readonly byteTableRva?: number;
  readonly byteEntries?: number;
  readonly byteIdx?: GprName;
  readonly guard: 'cmp' | 'and' | 'none';
  readonly expected: 'relocatable' | RefusalHazard;
}

/** How one switch turns its argument into the number of the case body that runs (see workload-model.ts). */
export interface SwitchModel {
  /** Seeds the constants of the case bodies. */
  readonly id: number;
  readonly bias: number;
  readonly shift: number;
  /** 0: not masked. */
  readonly mask: number;
  readonly entries: number;
  /** 0: one level. */
  readonly byteEntries: number;
  readonly byteRun: number;
  readonly bodies: number;
  readonly stride: number;
}

/** A function that the workload calls with an argument below `range`. */
export interface WorkloadCall {
  readonly function: string;
  readonly form: SwitchForm;
  readonly range: number;
  /** Two switches: the lowest bit of the argument chooses, the others are the index. */
  readonly switches: readonly SwitchModel[];
}

/** An export on which a hook must be refused. */
export interface UnhookableExport {
  readonly function: string;
  readonly reason: 'call' | 'branch-target' | 'too-short';
}

/** `sites.json`. */
export interface GuestSites {
  readonly sites: readonly SwitchSite[];
  /** In the order of the guest's own call tables. */
  readonly calls: readonly WorkloadCall[];
  /** Exports to hook by default: they put every table that can be relocated on a trapped page. */
  readonly defaultHooks: readonly string[];
  readonly unhookable: readonly UnhookableExport[];
}

export interface GuestArtefacts {
  /** The PE64 image. */
  readonly image: Buffer;
  readonly imagePath: string;
  /** The PE64 image that the kernel imports from. */
  readonly hal: Buffer;
  /** What the guest has as a Xen PVH domain: this HAL instead, and a start-up page. */
  readonly pvh: { readonly hal: Buffer; readonly startPage: Buffer };
  /** The ISF profile of the image. */
  readonly profilePath: string;
  readonly sites: GuestSites;
  /** Absent where it has not been fetched: the guest then boots without it. */
  readonly module?: GuestModule;
}

/** Where the set-up builds the guest to. */
export const GUEST_DIRECTORY = fileURLToPath(new URL('../../build/guest', import.meta.url));

/**
 * Reads what the set-up has built.
 *
 * @throws MemtablesError `SETUP_INCOMPLETE` when it is not there
 */
export function readGuestArtefacts(directory = GUEST_DIRECTORY): GuestArtefacts {
  const imagePath = join(directory, 'ntoskrnl.exe');
  const profilePath = join(directory, 'ntoskrnl.json');
  const module = readGuestModule();
  try {
    return {
      ...(module && { module }),
      image: readFileSync(imagePath),
      imagePath,
      hal: readFileSync(join(directory, 'hal.dll')),
      pvh: {
        hal: readFileSync(join(directory, 'pvh', 'hal.dll')),
        startPage: readFileSync(join(directory, 'pvh', 'start.bin')),
      },
      profilePath,
      sites: JSON.parse(readFileSync(join(directory, 'sites.json'), 'utf8')),
    };
  } catch (cause) {
    throw new MemtablesError('SETUP_INCOMPLETE', `the guest kernel is not built in ${directory}`, {
      remedy: 'Run `npm run setup`.',
      cause,
    });
  }
}

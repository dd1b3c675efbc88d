// What kept a vCPU from going on, as the addon writes it: one array that is used again for every report.
import type { Registers } from '../x86/registers.js';
import { fromRegisterFile, REGISTER_COUNT } from './register-file.js';

/** The numbers of native/machine/machine.h. */
export const REPORT_GUEST_FAULT = 0;
export const REPORT_DENIED = 1;
export const REPORT_SINGLE_STEP = 2;

export interface NativeReport {
  readonly kind: number;
  readonly vcpu: number;
  /** One of the permission bits. */
  readonly access: number;
  /** The page that was touched; the engine does not say where in it. */
  readonly page: bigint;
  readonly frame: bigint;
  /** Of the page fault that the guest is to get. */
  readonly errorCode: number;
  readonly registers: Registers;
  /** Up to 15 bytes from RIP on. */
  readonly code: Buffer;
}

/** In the order of native/machine/addon.cc, behind the registers. */
const KIND = REGISTER_COUNT;
const VCPU = KIND + 1;
const ACCESS = KIND + 2;
const PAGE = KIND + 3;
const FRAME = KIND + 4;
const ERROR_CODE = KIND + 5;
const CODE_LENGTH = KIND + 6;
const CODE = KIND + 7;
const WORDS = CODE + 2;
const NO_REPORT = 0xffff_ffff_ffff_ffffn;

export class ReportBlock {
  /** What the addon is given. */
  readonly words = new BigUint64Array(WORDS);
  readonly #bytes = new Uint8Array(this.words.buffer);

  /** What the last call reported. */
  read(): NativeReport | undefined {
    const { words } = this;
    if (words[KIND] === NO_REPORT) return undefined;
    const code = CODE * BigUint64Array.BYTES_PER_ELEMENT;
    return {
      kind: Number(words[KIND]),
      vcpu: Number(words[VCPU]),
      access: Number(words[ACCESS]),
      page: words[PAGE]!,
      frame: words[FRAME]!,
      errorCode: Number(words[ERROR_CODE]),
      registers: fromRegisterFile(words),
      code: Buffer.from(this.#bytes.subarray(code, code + Number(words[CODE_LENGTH]))),
    };
  }
}

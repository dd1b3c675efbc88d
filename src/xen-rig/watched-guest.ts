// The guest of the conformance checks: each of its vCPUs makes every kind of access over and over.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { GUEST_DIRECTORY } from '../guest/artefacts.js';
import { LONG_MODE } from '../guest/loader.js';
import { PageTableBuilder } from '../guest/page-tables.js';
import { pvhElf, START_FRAME } from '../guest/pvh.js';
import { type Gfn, type Gpa, type Gva, gpaOfFrame, PAGE_SIZE } from '../vmi/address.js';

export const VCPUS = 2;
export const MEMORY_MB = 16;

const CODE: Gva = 0xffff_f800_0000_0000n;
const DATA: Gva = 0xffff_f800_0010_0000n;
const STACKS: Gva = 0xffff_f800_0020_0000n;
const CODE_FRAME: Gfn = 0x200n;
/** Pages of data that follow each other are in frames that do not, and go down. */
const FIRST_DATA_FRAME: Gfn = 0x240n;
const FIRST_STACK_FRAME: Gfn = 0x250n;
const FIRST_TABLE_FRAME: Gfn = 0x280n;

const RETURN = 0xc3;

/** A frame with an instruction that accesses it once a pass, and what it accesses. */
export interface WatchedPage {
  readonly rip: Gva;
  readonly gva: Gva;
  readonly gpa: Gpa;
  readonly gfn: Gfn;
}

// As native/guest/platform/watched.s places them.
function page(index: number, codeOffset: bigint, offset = 0x10n): WatchedPage {
  const gfn = frameOfData(index);
  return {
    rip: CODE + codeOffset,
    gva: dataPage(index) + offset,
    gpa: gpaOfFrame(gfn) + offset,
    gfn,
  };
}

/** By how many bytes they read. */
export const READ_8 = page(0, 0x80n);
export const READ_4 = page(1, 0xa0n);
export const READ_2 = page(2, 0xc0n);
export const READ_1 = page(3, 0xe0n);
/** `rep movsq` of 4 elements. */
export const STRING = page(4, 0x120n);
/** Reads 8 bytes: 3 of this page, and 5 of the next. */
export const CROSSING = page(5, 0x100n, BigInt(PAGE_SIZE - 3));
export const BEHIND_CROSSING = page(6, 0x100n, 0n);
/** The first vCPU writes to it here, each further one 0x100 bytes behind. */
export const WRITTEN = page(7, 0x140n, 0n);
export const WRITTEN_STRIDE = 0x100n;
/** It executes here. */
export const CALLED: WatchedPage = { ...page(8, 0n, 0n), rip: dataPage(8) };
/** Sets RIP of a vCPU there: it counts that it came, and goes on. */
export const DETOUR: Gva = CODE + 0x180n;
export const CODE_PAGE = { gva: CODE, gfn: CODE_FRAME };
export const DATA_BASE = DATA;

const RESULTS = page(9, 0n, 0n);
const RESULTS_STRIDE = 0x100n;

/** Where in its results a vCPU keeps what. */
export const RESULT = {
  passes: 0x00n,
  seen8: 0x08n,
  seen4: 0x10n,
  seen2: 0x18n,
  seen1: 0x20n,
  seenCrossing: 0x28n,
  seenRcx: 0x30n,
  seenR15: 0x38n,
  detours: 0x40n,
  seenString: 0x60n,
} as const;

export function resultOf(vcpu: number, result: keyof typeof RESULT): Gpa {
  return RESULTS.gpa + BigInt(vcpu) * RESULTS_STRIDE + RESULT[result];
}

/** A frame of the guest's memory that it does not use; there are many. */
export function spareFrame(index: number): Gfn {
  return 0x400n + BigInt(index);
}

/** What the pages of data hold from the start. */
export function originalBytes(index: number): Buffer {
  return Buffer.from(Array.from({ length: PAGE_SIZE }, (_, at) => (at * 7 + index * 31 + (at >> 8)) & 0xff));
}

export interface WatchedGuest {
  /** The kernel of a PVH domain. */
  readonly kernel: Buffer;
  readonly pageTable: Gpa;
}

export function watchedGuest(): WatchedGuest {
  const folder = join(GUEST_DIRECTORY, 'pvh');
  let nextTable = FIRST_TABLE_FRAME;
  const tables = new PageTableBuilder(() => nextTable++);
  const pageTable = tables.createRoot();
  const startPage = readFileSync(join(folder, 'start.bin'));
  const kernel = pvhElf({ startPage, vcpus: VCPUS, memoryMB: MEMORY_MB }, (memory) => {
    tables.map(pageTable, gpaOfFrame(START_FRAME), START_FRAME, { execute: true });
    tables.map(pageTable, CODE, CODE_FRAME, { execute: true });
    memory.writePhysical(gpaOfFrame(CODE_FRAME), readFileSync(join(folder, 'watched.bin')));
    for (let index = 0; index <= 9; index++) {
      const frame = frameOfData(index);
      tables.map(pageTable, dataPage(index), frame, { write: true, execute: true });
      if (frame !== RESULTS.gfn) memory.writePhysical(gpaOfFrame(frame), originalBytes(index));
    }
    memory.writePhysical(CALLED.gpa, Buffer.from([RETURN]));
    for (let vcpu = 0; vcpu < VCPUS; vcpu++) {
      const stack = STACKS + BigInt(vcpu * PAGE_SIZE);
      tables.map(pageTable, stack, FIRST_STACK_FRAME + BigInt(vcpu), { write: true });
      memory.setRegisters(vcpu, {
        ...LONG_MODE,
        cr3: pageTable,
        rip: CODE,
        rsp: stack + BigInt(PAGE_SIZE),
        rcx: DATA,
        rdx: BigInt(vcpu),
      });
    }
    for (const { gpa, bytes } of tables.contents()) memory.writePhysical(gpa, bytes);
    return DATA;
  });
  return { kernel, pageTable };
}

function dataPage(index: number): Gva {
  return DATA + BigInt(index * PAGE_SIZE);
}

function frameOfData(index: number): Gfn {
  return FIRST_DATA_FRAME - BigInt(2 * index);
}

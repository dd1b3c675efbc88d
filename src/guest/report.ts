import { MemtablesError } from '../errors.js';
import { type Gva, hex, PAGE_SIZE, pageOffset } from '../vmi/address.js';
import type { Hypervisor } from '../vmi/hypervisor.js';
import type { SwitchForm } from './artefacts.js';
import { BOOT_BLOCK, type LoadedGuest } from './loader.js';

/** What one stream of switches has published about itself, at one moment. */
export interface StreamReport {
  readonly form: SwitchForm;
  readonly vcpu: number;
  /** The state of the stream's generator before its first switch. */
  readonly seed: number;
  /** Switches so far. */
  readonly running: bigint;
  /** The last published pair: after `count` switches the checksum was `checksum`. */
  readonly count: bigint;
  readonly checksum: number;
}

/** What the lexer of the module has done. */
export interface LexerReport {
  /** Pieces of the text that it has read. */
  readonly pieces: bigint;
  /** Times it has read the whole text. */
  readonly passes: bigint;
  /** Found so far. */
  readonly tokens: bigint;
  /** Of the tokens of the first pass; 0 until it has ended. */
  readonly checksum: number;
  /** Pieces in which a later pass has found other tokens than the first. */
  readonly mismatches: bigint;
}

/** What one processor has done. */
export interface ProcessorReport {
  readonly ticks: bigint;
  readonly halts: bigint;
  readonly dpcs: bigint;
}

export interface GuestReport {
  /** Per vCPU a one-level and a two-level thread and a one-level stream in its DPC; one of look-alikes. */
  readonly streams: readonly StreamReport[];
  readonly switches: Readonly<Record<SwitchForm, bigint>>;
  /** Absent until it has read a piece, and where the guest has no module. */
  readonly lexer?: LexerReport;
  readonly integrity: {
    /** Full passes over headers, non-writable sections and their slack. */
    readonly sweeps: bigint;
    /** Bytes that differed from what was there at boot, in code that was checked or read otherwise. */
    readonly mismatches: bigint;
    readonly firstMismatch?: { readonly gva: Gva; readonly expected: number; readonly found: number };
  };
  /** Reads of code bytes that are neither table loads nor the checker's. */
  readonly otherReads: bigint;
  readonly systemCalls: bigint;
  /** Rounds of the user-mode loop, and those that found a register changed. */
  readonly userLoops: bigint;
  readonly userErrors: bigint;
  readonly processors: readonly ProcessorReport[];
  /** Set once the guest has stopped itself. */
  readonly bugCheck?: {
    readonly vector: number;
    readonly rip: Gva;
    readonly errorCode: bigint;
    readonly cr2: bigint;
  };
}

/** The guest's memory, as a machine or a hypervisor reads it. */
export type PhysicalMemory = Pick<Hypervisor, 'readPhysical'>;

// The layout of the report, by native/guest/guest.inc.
const MAX_PROCESSORS = 32;
const STREAMS_USED = 0x00;
const SWEEPS = 0x08;
const MISMATCHES = 0x10;
const FIRST_MISMATCH = 0x18;
const FIRST_EXPECTED = 0x20;
const FIRST_FOUND = 0x24;
const OTHER_READS = 0x28;
const SYSTEM_CALLS = 0x30;
const USER_LOOPS = 0x38;
const USER_ERRORS = 0x40;
const STOPPED = 0x48;
const STOP_VECTOR = 0x50;
const STOP_RIP = 0x58;
const STOP_ERROR = 0x60;
const STOP_CR2 = 0x68;
const LEXER_SWITCHES = 0x70;
const LEXER_TOKENS = 0x78;
const LEXER_PASSES = 0x80;
const LEXER_MISMATCHES = 0x88;
const LEXER_CHECKSUM = 0x90;
const LEXER_PIECES = 0x98;
const PROCESSORS = 0xa0;
const PROCESSOR_BYTES = 0x20;
const TICKS = 0x00;
const HALTS = 0x08;
const DPCS = 0x10;
const STREAMS = PROCESSORS + MAX_PROCESSORS * PROCESSOR_BYTES;
const STREAM_BYTES = 0x40;
const MAX_STREAMS = 3 * MAX_PROCESSORS + 1;
const FORM = 0x00;
const VCPU = 0x04;
const SEED = 0x08;
const RUNNING = 0x10;
const SEQUENCE = 0x18;
const SLOTS = 0x20;
const SLOT_BYTES = 0x10;
const SLOT_COUNT = 0x00;
const SLOT_CHECKSUM = 0x08;
const REPORT_BYTES = STREAMS + MAX_STREAMS * STREAM_BYTES;

const FORMS: readonly (SwitchForm | undefined)[] = [undefined, 'one-level', 'two-level', 'look-alike'];

/**
 * Reads the guest's own counters; `undefined` until its kernel is up. A page of them has to be read as it was at
 * one moment, and what a hypervisor has cached must be flushed.
 *
 * @throws MemtablesError `GUEST_STRUCTURE_INVALID` when they are not what the kernel writes
 */
export function readGuestReport(memory: PhysicalMemory, guest: LoadedGuest): GuestReport | undefined {
  const address = readVirtual(
    memory,
    guest,
    guest.bootBlock + BigInt(BOOT_BLOCK.report),
    8,
  ).readBigUInt64LE();
  if (address === 0n) return undefined;
  const report = readVirtual(memory, guest, address, REPORT_BYTES);
  const used = report.readUInt32LE(STREAMS_USED);
  if (used > MAX_STREAMS) throw invalid(`it counts ${used} streams`);
  const streams = Array.from({ length: used }, (_, index) =>
    readStream(report.subarray(STREAMS + index * STREAM_BYTES)),
  );
  const lexed = report.readBigUInt64LE(LEXER_SWITCHES);
  const switches = { 'one-level': 0n, 'two-level': 0n, 'look-alike': 0n, lexer: lexed };
  for (const { form, running } of streams) switches[form] += running;
  const first = report.readBigUInt64LE(FIRST_MISMATCH);
  const pieces = report.readBigUInt64LE(LEXER_PIECES);
  return {
    streams,
    switches,
    ...(pieces !== 0n && {
      lexer: {
        pieces,
        passes: report.readBigUInt64LE(LEXER_PASSES),
        tokens: report.readBigUInt64LE(LEXER_TOKENS),
        checksum: report.readUInt32LE(LEXER_CHECKSUM),
        mismatches: report.readBigUInt64LE(LEXER_MISMATCHES),
      },
    }),
    integrity: {
      sweeps: report.readBigUInt64LE(SWEEPS),
      mismatches: report.readBigUInt64LE(MISMATCHES),
      ...(first !== 0n && {
        firstMismatch: {
          gva: first,
          expected: report.readUInt32LE(FIRST_EXPECTED),
          found: report.readUInt32LE(FIRST_FOUND),
        },
      }),
    },
    otherReads: report.readBigUInt64LE(OTHER_READS),
    systemCalls: report.readBigUInt64LE(SYSTEM_CALLS),
    userLoops: report.readBigUInt64LE(USER_LOOPS),
    userErrors: report.readBigUInt64LE(USER_ERRORS),
    processors: Array.from({ length: guest.vcpuCount }, (_, index) => {
      const at = PROCESSORS + index * PROCESSOR_BYTES;
      return {
        ticks: report.readBigUInt64LE(at + TICKS),
        halts: report.readBigUInt64LE(at + HALTS),
        dpcs: report.readBigUInt64LE(at + DPCS),
      };
    }),
    ...(report.readBigUInt64LE(STOPPED) !== 0n && {
      bugCheck: {
        vector: report.readUInt32LE(STOP_VECTOR),
        rip: report.readBigUInt64LE(STOP_RIP),
        errorCode: report.readBigUInt64LE(STOP_ERROR),
        cr2: report.readBigUInt64LE(STOP_CR2),
      },
    }),
  };
}

/** The slot that the sequence number names is complete at any moment: the guest writes the other one. */
function readStream(stream: Buffer): StreamReport {
  const form = FORMS[stream.readUInt32LE(FORM)];
  if (form === undefined) throw invalid('a stream has no form');
  const slot = SLOTS + (stream.readUInt32LE(SEQUENCE) & 1) * SLOT_BYTES;
  return {
    form,
    vcpu: stream.readUInt32LE(VCPU),
    seed: stream.readUInt32LE(SEED),
    running: stream.readBigUInt64LE(RUNNING),
    count: stream.readBigUInt64LE(slot + SLOT_COUNT),
    checksum: stream.readUInt32LE(slot + SLOT_CHECKSUM),
  };
}

function readVirtual(memory: PhysicalMemory, guest: LoadedGuest, gva: Gva, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let done = 0; done < length; ) {
    const at = gva + BigInt(done);
    const gpa = guest.translate(at);
    if (gpa === undefined) throw invalid(`nothing is mapped at ${hex(at)}`);
    const piece = Math.min(PAGE_SIZE - pageOffset(at), length - done);
    bytes.set(memory.readPhysical(gpa, piece), done);
    done += piece;
  }
  return bytes;
}

function invalid(why: string): MemtablesError {
  return new MemtablesError('GUEST_STRUCTURE_INVALID', `the guest's report cannot be read: ${why}`, {
    remedy: 'Something has overwritten the guest; start a new one.',
  });
}

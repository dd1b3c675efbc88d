import { describe, expect, it, onTestFinished } from 'vitest';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import { lexerText } from '../../src/guest/lexer-text.js';
import { LEXER_PIECE_BYTES } from '../../src/guest/loader.js';
import { type PvhOptions, pvhKernel } from '../../src/guest/pvh.js';
import { readGuestReport } from '../../src/guest/report.js';
import { predictChecksum } from '../../src/guest/workload-model.js';
import { createMachine } from '../../src/machine/create-machine.js';
import { ExportTable } from '../../src/nt/exports.js';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage } from '../../src/nt/pe.js';
import { PAGE_SIZE } from '../../src/vmi/address.js';
import { CLOCK_VECTOR } from './stepped-guest.js';

const artefacts = readGuestArtefacts();
const { image, module } = artefacts;
const MEMORY_MB = 32;
const BYTES_PER_MB = 1 << 20;
const TICK_MICROSECONDS = 1000;
const MAX_RUNS = 20_000;
// The start-up page, by native/guest/platform/pvh.inc.
const START_PAGE = 0x1000;
const DOMAIN_ENTRY = 0x1040;
const PARAMETERS = 0x400;
const STACKS = 0x440;

function kernel(options: Partial<PvhOptions> = {}) {
  return pvhKernel({ image, ...artefacts.pvh, seed: 1, vcpus: 1, memoryMB: MEMORY_MB, ...options });
}

interface Loadable {
  readonly gpa: number;
  readonly bytes: Buffer;
}

/** As a loader reads the file: what it loads, and its notes. */
function readElf(elf: Buffer): { entry: number; segments: Loadable[]; notes: Buffer[] } {
  expect(elf.toString('latin1', 0, 7)).toBe('\x7fELF\x02\x01\x01');
  expect([elf.readUInt16LE(18), elf.readUInt16LE(54)]).toEqual([62, 56]);
  const segments: Loadable[] = [];
  const notes: Buffer[] = [];
  for (let index = 0; index < elf.readUInt16LE(56); index++) {
    const header = elf.subarray(Number(elf.readBigUInt64LE(32)) + index * 56).subarray(0, 56);
    const [offset, , gpa, fileSize, memorySize] = [8, 16, 24, 32, 40].map((at) =>
      Number(header.readBigUInt64LE(at)),
    );
    expect(fileSize).toBe(memorySize);
    expect(offset! + fileSize!).toBeLessThanOrEqual(elf.length);
    const bytes = elf.subarray(offset!, offset! + fileSize!);
    if (header.readUInt32LE(0) === 1) segments.push({ gpa: gpa!, bytes });
    else notes.push(bytes);
  }
  return { entry: Number(elf.readBigUInt64LE(24)), segments, notes };
}

function startPage(elf: Buffer): Buffer {
  return readElf(elf)
    .segments.find(({ gpa }) => gpa === START_PAGE)!
    .bytes.subarray(0, PAGE_SIZE);
}

describe('the kernel of a Xen PVH domain', () => {
  it.each([1, 2, 3])(
    'has each page in one place of the memory, and leaves Xen some of it (seed %d)',
    (seed) => {
      let end = 0;
      for (const { gpa, bytes } of readElf(kernel({ seed, vcpus: 4 }).elf).segments) {
        expect(gpa).toBeGreaterThan(end);
        expect([gpa % PAGE_SIZE, bytes.length % PAGE_SIZE]).toEqual([0, 0]);
        end = gpa + bytes.length;
      }
      expect(end).toBeLessThanOrEqual((MEMORY_MB - 4) * BYTES_PER_MB);
    },
  );

  it('says in the one note that Xen asks for where the domain begins', () => {
    const { entry, notes } = readElf(kernel().elf);
    expect(entry).toBe(DOMAIN_ENTRY);
    // Lengths of owner and value, XEN_ELFNOTE_PHYS32_ENTRY, owner, value.
    const [note] = notes;
    expect([0, 4, 8, 16].map((at) => note!.readUInt32LE(at))).toEqual([4, 4, 18, DOMAIN_ENTRY]);
    expect(note!.toString('latin1', 12, 16)).toBe('Xen\0');
    expect(notes).toHaveLength(1);
  });

  it('has a start-up page that begins both ways with interrupts off, and is mapped where it lies', () => {
    const { elf, guest } = kernel();
    const page = startPage(elf);
    const cli = 0xfa;
    expect([page[0], page[DOMAIN_ENTRY - START_PAGE]]).toEqual([cli, cli]);
    expect(page.subarray(0, PARAMETERS)).toEqual(artefacts.pvh.startPage.subarray(0, PARAMETERS));
    expect(guest.translate(BigInt(START_PAGE))).toBe(BigInt(START_PAGE));
  });

  it('is the guest: loaded into a machine, with what its start-up page loads into each processor, it works', () => {
    const vcpus = 2;
    const text = lexerText(5, LEXER_PIECE_BYTES);
    const { elf, guest } = kernel({ seed: 5, vcpus, ...(module && { module: { ...module, text } }) });
    const machine = createMachine({ vcpus, memoryBytes: MEMORY_MB * BYTES_PER_MB });
    onTestFinished(() => machine.close());
    for (const { gpa, bytes } of readElf(elf).segments) machine.writePhysical(BigInt(gpa), bytes);
    const page = startPage(elf);
    const [cr3, cr4, efer, cr0, rip, rcx, processors] = [0, 1, 2, 3, 4, 5, 6].map((index) =>
      page.readBigUInt64LE(PARAMETERS + index * 8),
    );
    expect(processors).toBe(BigInt(vcpus));
    const LMA = 0x400n;
    for (let vcpu = 0; vcpu < vcpus; vcpu++) {
      const rsp = page.readBigUInt64LE(STACKS + vcpu * 8);
      machine.setRegisters(vcpu, {
        ...{ cr3: cr3!, cr4: cr4!, efer: efer! | LMA, cr0: cr0!, rip: rip!, rcx: rcx!, rsp },
        rdx: BigInt(vcpu),
      });
    }
    machine.setTimer(CLOCK_VECTOR, TICK_MICROSECONDS);
    const report = () => readGuestReport(machine, guest);
    for (let run = 0; run < MAX_RUNS && (report()?.integrity.sweeps ?? 0n) < 2n; run++) {
      machine.run(TICK_MICROSECONDS);
    }
    const { integrity, streams, bugCheck, userErrors, processors: each } = report()!;
    expect(integrity.sweeps).toBeGreaterThanOrEqual(2n);
    expect({ mismatches: integrity.mismatches, bugCheck, userErrors }).toEqual({
      mismatches: 0n,
      bugCheck: undefined,
      userErrors: 0n,
    });
    expect(each.every(({ ticks }) => ticks > 0n)).toBe(true);
    for (const { form, seed, count, checksum } of streams) {
      expect(checksum).toBe(predictChecksum(artefacts.sites.calls, form, seed, count));
    }
    expect(machine.takeConsole()).toContain('kernel up');
  });

  it('has a HAL with the functions of the embedded one, and unwind data for those that use the stack', () => {
    const hal = PeImage.fromFile(artefacts.pvh.hal);
    const names = (file: Buffer) =>
      [...ExportTable.read(PeImage.fromFile(file)).entries()].map(([name]) => name).sort();
    expect(names(artefacts.pvh.hal)).toEqual(names(artefacts.hal));
    const functions = FunctionTable.read(hal);
    for (const name of ['HalStartProcessors', 'HalStartClock', 'HalEndOfInterrupt']) {
      expect(functions.entryAt(ExportTable.read(hal).rvaOf(name)), name).toBeDefined();
    }
  });

  it.each([
    ['no vCPU', { vcpus: 0 }],
    ['more vCPUs than the guest can have', { vcpus: 33 }],
    ['a part of one', { vcpus: 1.5 }],
    ['no memory', { memoryMB: 0 }],
    ['what Xen needs alone', { memoryMB: 4 }],
  ])('is not made for %s', (_what, options) => {
    expect(() => kernel(options)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
  });
});

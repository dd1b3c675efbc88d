import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { readGuestArtefacts } from '../../src/guest/artefacts.js';
import { layOutImage } from '../../src/guest/image.js';
import { ExportTable } from '../../src/nt/exports.js';
import { importedFiles } from '../../src/nt/imports.js';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage, type Section } from '../../src/nt/pe.js';
import { loadProfile } from '../../src/nt/profile.js';
import { PAGE_SIZE } from '../../src/vmi/address.js';
import { Disassembler, FlowControl, gprName, type Instruction, Mnemonic } from '../../src/x86/instruction.js';
import { GPR_NAMES } from '../../src/x86/registers.js';

const artefacts = readGuestArtefacts();
const image = PeImage.fromFile(artefacts.image);
const profile = loadProfile(artefacts.profilePath);
const { sites } = artefacts.sites;

/** IMAGE_SCN_* of the sections of a real ntoskrnl.exe, build 19041. */
const NT_CHARACTERISTICS: Record<string, number> = {
  '.text': 0x68000020,
  POOLCODE: 0x68000020,
  TRACESUP: 0x68000020,
  RETPOL: 0x68000020,
  MINIEX: 0x68000020,
  KVASCODE: 0x68000020,
  INITKDBG: 0x68000020,
  PAGE: 0x60000020,
  INIT: 0x62000020,
  '.rdata': 0x48000040,
  '.pdata': 0x48000040,
  '.edata': 0x40000040,
  '.data': 0xc8000040,
  '.reloc': 0x42000040,
};

/** Offsets of a real ntkrnlmp.pdb, build 19041. */
const NT_OFFSETS: Record<string, Record<string, number>> = {
  _EPROCESS: {
    UniqueProcessId: 0x440,
    ActiveProcessLinks: 0x448,
    Peb: 0x550,
    ImageFileName: 0x5a8,
    ThreadListHead: 0x5e0,
    ActiveThreads: 0x5f0,
  },
  _KPROCESS: { DirectoryTableBase: 0x28, ThreadListHead: 0x30, UserDirectoryTableBase: 0x388 },
  _ETHREAD: { StartAddress: 0x450, Cid: 0x478, ThreadListEntry: 0x4e8 },
  _KTHREAD: {
    InitialStack: 0x28,
    StackLimit: 0x30,
    StackBase: 0x38,
    KernelStack: 0x58,
    TrapFrame: 0x90,
    ApcState: 0x98,
    State: 0x184,
    Process: 0x220,
    PreviousMode: 0x232,
    WaitReason: 0x283,
    ThreadListEntry: 0x2f8,
  },
  _KPCR: { GdtBase: 0, TssBase: 8, UserRsp: 0x10, Self: 0x18, CurrentPrcb: 0x20, IdtBase: 0x38, Prcb: 0x180 },
  _KPRCB: { CurrentThread: 8, NextThread: 0x10, IdleThread: 0x18, Number: 0x24, RspBase: 0x28 },
  _KLDR_DATA_TABLE_ENTRY: {
    InLoadOrderLinks: 0,
    DllBase: 0x30,
    EntryPoint: 0x38,
    SizeOfImage: 0x40,
    FullDllName: 0x48,
    BaseDllName: 0x58,
    LoadCount: 0x6c,
  },
  _KTSS64: { Rsp0: 4, Ist: 0x1c, IoMapBase: 0x66 },
  _KTRAP_FRAME: {
    PreviousMode: 0x28,
    MxCsr: 0x2c,
    Rax: 0x30,
    Xmm0: 0x70,
    Rbp: 0x158,
    ErrorCode: 0x160,
    Rip: 0x168,
    SegCs: 0x170,
    EFlags: 0x178,
    Rsp: 0x180,
    SegSs: 0x188,
  },
};

/** Tables among the code. */
const DATA = new Set(['KiServiceTable', 'KiServiceLimit', 'KiTrapStubs']);
const profileText = JSON.parse(readFileSync(artefacts.profilePath, 'utf8'));
const names = new Map(
  Object.entries(profileText.symbols as Record<string, { address: number }>).map(([name, { address }]) => [
    address,
    name,
  ]),
);
const nameAt = (rva: number) => names.get(rva) ?? `the function at ${rva.toString(16)}`;
/** Functions are what is aligned as one and has a name; ascending. */
const functionStarts = ({ rva, virtualSize }: Section) =>
  [...names.keys()]
    .filter((at) => at >= rva && at < rva + virtualSize && at % 16 === 0 && !DATA.has(nameAt(at)))
    .sort((a, b) => a - b);

/** From the start of a function to the next, or to the tables in between. */
function instructionsOf(begin: number, section: Section): Instruction[] {
  const ends = [...functionStarts(section), ...[...names.keys()].filter((at) => DATA.has(nameAt(at)))];
  const end = Math.min(
    ...[...ends, ...sites.map(({ tableRva }) => tableRva), section.rva + section.virtualSize].filter(
      (at) => at > begin,
    ),
  );
  const disassembler = new Disassembler(image.read(begin, end - begin), BigInt(begin));
  const instructions: Instruction[] = [];
  for (let at = 0; begin + at < end; ) {
    const instruction = disassembler.at(at);
    if (instruction === undefined) break;
    instructions.push(instruction);
    at += instruction.length;
  }
  disassembler.free();
  return instructions;
}

describe('the image of the guest', () => {
  it('has the sections of an NT kernel, treated as NT treats them', () => {
    const found = Object.fromEntries(
      image.sections.map((section) => [section.name, section.characteristics >>> 0]),
    );
    expect(found).toEqual(NT_CHARACTERISTICS);
  });

  it('has slack behind every section, and it is zero', () => {
    const { bytes } = layOutImage(artefacts.image);
    for (const { name, rva, virtualSize } of image.sections) {
      const end = rva + virtualSize;
      const pageEnd = Math.ceil(end / PAGE_SIZE) * PAGE_SIZE;
      expect(pageEnd - end, name).toBeGreaterThan(0);
      expect(
        bytes.subarray(end, pageEnd).every((byte) => byte === 0),
        name,
      ).toBe(true);
    }
    expect(image.sizeOfImage).toBe(bytes.length);
  });

  it('is named by its debug record and its profile alike', () => {
    const { metadata } = JSON.parse(readFileSync(artefacts.profilePath, 'utf8'));
    const { GUID: guid, age, database: name } = metadata.windows.pdb;
    expect(image.pdb()).toEqual({ guid, age, name });
  });

  it('exports what the profile names, where it says', () => {
    const exports = ExportTable.read(image);
    for (const { function: name } of artefacts.sites.calls)
      expect(exports.rvaOf(name)).toBe(profile.symbol(name));
    for (const { function: name } of artefacts.sites.unhookable) {
      expect(exports.rvaOf(name)).toBe(profile.symbol(name));
    }
    expect(exports.rvaOf('PsInitialSystemProcess')).toBe(profile.symbol('PsInitialSystemProcess'));
  });

  it('has its system services in a table of its own, each a function of .text', () => {
    const limit = image.readU32(profile.symbol('KiServiceLimit'));
    const table = profile.symbol('KiServiceTable');
    const text = image.sections.find(({ name }) => name === '.text')!;
    expect(limit).toBeGreaterThan(0);
    expect(image.sectionAt(table)).toEqual(text);
    for (let service = 0; service < limit; service++) {
      const entry = image.readU32(table + service * 4) | 0;
      const target = table + (entry >> 4);
      expect(target).toBeGreaterThanOrEqual(text.rva);
      expect(target).toBeLessThan(text.rva + text.virtualSize);
    }
  });
});

describe('the kernel', () => {
  it('does not know what it runs on: it talks to no device and to no hypervisor, but calls the HAL', () => {
    const talking = new Set<string>();
    for (const section of image.sections.filter(({ executable }) => executable)) {
      for (const begin of functionStarts(section)) {
        for (const { mnemonic } of instructionsOf(begin, section)) {
          if (HOST_INSTRUCTIONS.has(mnemonic)) talking.add(nameAt(begin));
        }
      }
    }
    expect([...talking]).toEqual([]);
    expect(importedFiles(image)).toEqual(['hal.dll']);
  });
});

describe('the profile of the guest', () => {
  it('has the offsets of Windows 10, build 19041', () => {
    for (const [type, fields] of Object.entries(NT_OFFSETS)) {
      for (const [field, offset] of Object.entries(fields)) {
        expect(profile.offset(type, field), `${type}.${field}`).toBe(offset);
      }
    }
    const build = image.sections.find(({ name }) => name === '.data')!;
    expect(image.sectionAt(profile.symbol('NtBuildNumber'))).toEqual(build);
    expect(image.readU32(profile.symbol('NtBuildNumber')) & 0xffff).toBe(19041);
  });

  it('has no field outside of its type', () => {
    const { user_types: types, base_types: bases } = JSON.parse(readFileSync(artefacts.profilePath, 'utf8'));
    type IsfType = { kind: string; name?: string; count?: number; subtype?: IsfType };
    const sizeOf = ({ kind, name, count, subtype }: IsfType): number => {
      if (kind === 'array') return count! * sizeOf(subtype!);
      return kind === 'struct' ? types[name!].size : bases[kind === 'pointer' ? kind : name!].size;
    };
    for (const [type, { size, fields }] of Object.entries<{
      size: number;
      fields: Record<string, { offset: number; type: IsfType }>;
    }>(types)) {
      let end = 0;
      for (const [field, { offset, type: fieldType }] of Object.entries(fields)) {
        // In the order of their offsets, as they are written: one that begins inside another is a mistake.
        expect(offset, `${type}.${field}`).toBeGreaterThanOrEqual(end);
        end = offset + sizeOf(fieldType);
        expect(end, `${type}.${field}`).toBeLessThanOrEqual(size);
      }
    }
  });
});

describe('the unwind data of the guest', () => {
  const functions = FunctionTable.read(image);

  it('covers every switch with its tables, except in leaf functions', () => {
    let leaves = 0;
    for (const { function: name, functionRva, loadRva, tableRva, entries } of sites) {
      const entry = functions.entryAt(functionRva);
      if (entry === undefined) {
        leaves++;
        continue;
      }
      expect(entry.begin, name).toBe(functionRva);
      expect(loadRva, name).toBeLessThan(entry.end);
      const ownTable = image.sectionAt(tableRva) === image.sectionAt(loadRva) && tableRva > functionRva;
      if (ownTable) expect(tableRva + entries * 4, name).toBeLessThanOrEqual(entry.end);
    }
    expect(leaves).toBeGreaterThanOrEqual(5);
  });

  it('is there for every function that is not a leaf', () => {
    for (const section of image.sections.filter(({ executable }) => executable)) {
      for (const begin of functionStarts(section)) {
        if (functions.entryAt(begin)?.begin === begin) continue;
        for (const { flow, mnemonic } of instructionsOf(begin, section)) {
          const moves = mnemonic === Mnemonic.Push || mnemonic === Mnemonic.Call;
          expect(moves, `${nameAt(begin)} needs unwind data`).toBe(false);
          if (ENDS.has(flow)) break;
        }
      }
    }
  });

  it('describes the pushes of each prologue', () => {
    for (const { begin, unwind } of functions.entries) {
      const codes = image.read(unwind, 4);
      const count = codes[2]!;
      const slots = image.read(unwind + 4, count * 2);
      const saved: string[] = [];
      let trap = false;
      for (let slot = 0; slot < count; slot++) {
        const [operation, info] = [slots[slot * 2 + 1]! & 15, slots[slot * 2 + 1]! >> 4];
        if (operation === PUSH_NONVOLATILE) saved.unshift(GPR_NAMES[info]!);
        if (operation === ALLOCATE_LARGE) slot += info === 0 ? 1 : 2;
        if (operation === PUSH_MACHINE_FRAME) trap = true;
      }
      // Of a trap handler the processor, or the handler itself, has pushed a machine frame before.
      if (!trap) expect(saved, nameAt(begin)).toEqual(pushedBy(begin, codes[1]!));
    }
  });
});

/** UWOP_*. */
const PUSH_NONVOLATILE = 0;
const ALLOCATE_LARGE = 1;
const PUSH_MACHINE_FRAME = 10;
/** What ends a function. */
const ENDS = new Set([FlowControl.Return, FlowControl.UnconditionalBranch, FlowControl.IndirectBranch]);
/** What reaches a device or a hypervisor; MSRs and control registers are the processor's. */
const HOST_INSTRUCTIONS = new Set([
  ...[Mnemonic.In, Mnemonic.Insb, Mnemonic.Insd, Mnemonic.Out, Mnemonic.Outsb, Mnemonic.Outsd],
  ...[Mnemonic.Vmcall, Mnemonic.Vmmcall, Mnemonic.Vmfunc, Mnemonic.Cpuid, Mnemonic.Rdtsc, Mnemonic.Rdtscp],
]);

function pushedBy(begin: number, prologueBytes: number): string[] {
  const disassembler = new Disassembler(image.read(begin, prologueBytes), BigInt(begin));
  const pushed: string[] = [];
  for (let at = 0; at < prologueBytes; ) {
    const { mnemonic, operands, length } = disassembler.at(at)!;
    const [operand] = operands;
    if (mnemonic === Mnemonic.Push && operand?.kind === 'register') pushed.push(gprName(operand.register));
    at += length;
  }
  disassembler.free();
  return pushed;
}

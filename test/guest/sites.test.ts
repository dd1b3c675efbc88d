import { describe, expect, it } from 'vitest';
import { type RefusalHazard, readGuestArtefacts, type SwitchSite } from '../../src/guest/artefacts.js';
import { FunctionTable } from '../../src/nt/pdata.js';
import { PeImage } from '../../src/nt/pe.js';
import { loadProfile } from '../../src/nt/profile.js';
import { CANDIDATE_RULES, checkCandidate } from '../../src/switches/candidate.js';
import { scanImage } from '../../src/switches/scan.js';
import { PAGE_SIZE } from '../../src/vmi/address.js';
import {
  Disassembler,
  decodeInstruction,
  gprName,
  type Instruction,
  Mnemonic,
} from '../../src/x86/instruction.js';
import { GPR_NAMES, type GprName } from '../../src/x86/registers.js';

const artefacts = readGuestArtefacts();
const image = PeImage.fromFile(artefacts.image);
const profile = loadProfile(artefacts.profilePath);
const functions = FunctionTable.read(image);
const { sites, calls, defaultHooks } = artefacts.sites;
const relocatable = sites.filter(({ expected }) => expected === 'relocatable');
const lookAlikes = sites.filter(({ expected }) => expected !== 'relocatable');
/** Everything but RSP can be a base, an index or a destination. */
const USABLE = GPR_NAMES.filter((name) => name !== 'rsp');

const DWORD = 4;

function instructionAt(rva: number): Instruction {
  const decoded = decodeInstruction(image.read(rva, 16), BigInt(rva));
  if (decoded === undefined) throw new Error(`no instruction at ${rva.toString(16)}`);
  return decoded;
}

/** The parts of `op reg, [base + index * scale + displacement]`. */
function loadAt(rva: number) {
  const instruction = instructionAt(rva);
  const [destination, source] = instruction.operands;
  if (destination?.kind !== 'register' || source?.kind !== 'memory') {
    throw new Error(`no load at ${rva.toString(16)}`);
  }
  return {
    mnemonic: instruction.mnemonic,
    length: instruction.length,
    dst: gprName(destination.register),
    dstSize: destination.size,
    base: gprName(source.base),
    idx: gprName(source.index),
    scale: source.scale,
    size: source.size,
    table: Number(source.displacement),
  };
}

/** The instructions of a function up to its tables, by their RVAs, decoded one behind the other. */
function codeOf({ functionRva, tableRva }: SwitchSite): Map<number, Instruction> {
  const disassembler = new Disassembler(image.read(functionRva, tableRva - functionRva), BigInt(functionRva));
  const code = new Map<number, Instruction>();
  for (let at = functionRva; at < tableRva; ) {
    const instruction = disassembler.at(at - functionRva);
    if (instruction === undefined) break;
    code.set(at, instruction);
    at += instruction.length;
  }
  disassembler.free();
  return code;
}

const entriesOf = ({ tableRva, entries }: SwitchSite) =>
  Array.from({ length: entries }, (_, index) => image.readU32(tableRva + index * DWORD));
const bytesOf = ({ byteTableRva, byteEntries }: SwitchSite) => [...image.read(byteTableRva!, byteEntries!)];
const pageOf = (rva: number) => Math.floor(rva / PAGE_SIZE);
const pagesOf = (rva: number, size: number) => {
  const [first, last] = [pageOf(rva), pageOf(rva + size - 1)];
  return Array.from({ length: last - first + 1 }, (_, index) => first + index);
};

describe.each(relocatable.map((site) => [site.name, site] as const))('the site %s', (_name, site) => {
  it('is the load that the list says it is', () => {
    expect(loadAt(site.loadRva)).toMatchObject({
      mnemonic: Mnemonic.Mov,
      dst: site.dst,
      dstSize: DWORD,
      base: site.base,
      idx: site.idx,
      scale: DWORD,
      size: DWORD,
      table: site.tableRva,
    });
    expect(image.sectionAt(site.loadRva)?.name).toBe(site.section);
    expect(profile.symbol(site.function)).toBe(site.functionRva);
    if (site.byteLoadRva === undefined) return;
    expect(loadAt(site.byteLoadRva)).toMatchObject({
      mnemonic: Mnemonic.Movzx,
      dst: site.idx,
      dstSize: DWORD,
      base: site.base,
      idx: site.byteIdx,
      scale: 1,
      size: 1,
      table: site.byteTableRva,
    });
  });

  it('has a table of which every entry is an instruction of its function, or 0', () => {
    const code = codeOf(site);
    for (const entry of entriesOf(site)) {
      if (entry !== 0) expect(code.has(entry), entry.toString(16)).toBe(true);
    }
    if (site.byteLoadRva === undefined) return;
    // The byte table lies directly behind the dwords, and names each of them.
    expect(site.byteTableRva).toBe(site.tableRva + site.entries * DWORD);
    const named = new Set(bytesOf(site));
    expect([...named].sort((a, b) => a - b)).toEqual(
      Array.from({ length: site.entries }, (_, index) => index),
    );
  });

  it('is as long as its guard says, or the index’s type', () => {
    const values = site.byteEntries ?? site.entries;
    const limits = new Set<number>();
    for (const { mnemonic, operands } of codeOf(site).values()) {
      const value = operands[1];
      if (value?.kind !== 'immediate') continue;
      if (mnemonic === Mnemonic.Cmp) limits.add(Number(value.value) + 1).add(Number(value.value));
      if (mnemonic === Mnemonic.And) limits.add(Number(value.value) + 1);
    }
    // Nothing says it where the caller keeps to the range, or the guard is not one for every index.
    if (site.guard === 'none') expect(values).toBe(site.byteEntries === undefined ? 6 : 256);
    else expect(limits.has(values)).toBe(true);
  });

  it('is proven by the recogniser, with the same bounds', () => {
    expect(scanned.get(site.loadRva)).toMatchObject({
      found: true,
      form: site.form,
      table: site.tableRva,
      entries: site.entries,
      base: site.base,
      index: site.idx,
      destination: site.dst,
    });
  });
});

const scanned = new Map(scanImage(image).map((site) => [site.rva, site]));

describe('the forms of the workload', () => {
  const oneLevel = relocatable.filter(({ form }) => form === 'one-level');
  const twoLevel = relocatable.filter(({ form }) => form === 'two-level');
  const registersOf = (among: readonly SwitchSite[], role: 'base' | 'idx' | 'dst' | 'byteIdx') =>
    USABLE.filter((register: GprName) => among.some((site) => site[role] === register));

  it.each([
    ['one-level', oneLevel, ['base', 'idx', 'dst']],
    ['two-level', twoLevel, ['base', 'idx', 'dst', 'byteIdx']],
  ] as const)('have every register in every role: %s', (_form, among, roles) => {
    for (const role of roles) expect(registersOf(among, role), role).toEqual(USABLE);
  });

  const isLeaf = (site: SwitchSite) => functions.entryAt(site.functionRva) === undefined;
  const instructions = (site: SwitchSite) => [...codeOf(site).values()];
  const isTarget = (site: SwitchSite, rva: number) =>
    instructions(site).some(
      ({ operands: [target] }) => target?.kind === 'branch' && Number(target.target) === rva,
    );
  const behind = (site: SwitchSite) => instructionAt(site.loadRva + instructionAt(site.loadRva).length);
  const imageBases = (site: SwitchSite) =>
    instructions(site)
      .filter(({ mnemonic }) => mnemonic === Mnemonic.Lea)
      .map(({ ip }) => Number(ip));
  const guardOf = (site: SwitchSite) =>
    instructions(site).find(({ mnemonic }) => mnemonic === Mnemonic.Cmp)?.ip ?? 0n;
  const sharing = (among: readonly SwitchSite[], table: 'tableRva' | 'byteTableRva') =>
    among.filter((site) => among.some((other) => other !== site && other[table] === site[table])).length;

  it.each<[string, (site: SwitchSite) => boolean, number, number]>([
    ['the destination is the index', ({ dst, idx }) => dst === idx, 5, 1],
    ['the destination is the base, and a second LEA follows', ({ dst, base }) => dst === base, 2, 1],
    ['a register from R8 to R15', ({ base, idx, dst }) => /r[89]|r1\d/.test(base + idx + dst), 10, 5],
    ['a load without REX, of 7 bytes', ({ loadRva }) => instructionAt(loadRva).length === 7, 5, 2],
    ['a load with REX, of 8 bytes', ({ loadRva }) => instructionAt(loadRva).length === 8, 5, 2],
    ['the load is a branch target', (site) => isTarget(site, site.byteLoadRva ?? site.loadRva), 1, 1],
    [
      'the base is set above the guard',
      (site) => imageBases(site).some((at) => BigInt(at) < guardOf(site)),
      3,
      1,
    ],
    ['something stands between load and ADD', (site) => behind(site).mnemonic !== Mnemonic.Add, 3, 2],
    ['a leaf function without unwind data', isLeaf, 4, 1],
    [
      'an index of its own for the byte table',
      ({ idx, byteIdx }) => byteIdx !== undefined && byteIdx !== idx,
      0,
      5,
    ],
    ['a mask is the guard', ({ guard }) => guard === 'and', 1, 0],
    ['the index’s type is the guard', ({ guard }) => guard === 'none', 0, 1],
    ['entries of 0, for values that cannot occur', (site) => entriesOf(site).includes(0), 1, 0],
    ['one entry', ({ entries }) => entries === 1, 1, 0],
    ['200 entries', ({ entries }) => entries === 200, 1, 0],
    ['more bytes than 256', ({ byteEntries = 0 }) => byteEntries > 256, 0, 1],
    ['zero as the first byte', (site) => site.form === 'two-level' && bytesOf(site)[0] === 0, 0, 5],
    ['the load lies on two pages', ({ loadRva }) => pagesOf(loadRva, 7).length === 2, 1, 0],
    ['outside of .text', ({ section }) => section !== '.text', 1, 0],
  ])('has sites where: %s', (_what, condition, one, two) => {
    expect(oneLevel.filter(condition).length).toBeGreaterThanOrEqual(one);
    expect(twoLevel.filter(condition).length).toBeGreaterThanOrEqual(two);
  });

  it('share tables, also byte tables, and have tables back to back', () => {
    expect(sharing(oneLevel, 'tableRva')).toBeGreaterThanOrEqual(2);
    expect(sharing(twoLevel, 'tableRva')).toBeGreaterThanOrEqual(2);
    expect(sharing(twoLevel, 'byteTableRva')).toBeGreaterThanOrEqual(2);
    const ends = new Set(relocatable.map(({ tableRva, entries }) => tableRva + entries * DWORD));
    expect(oneLevel.some(({ tableRva }) => ends.has(tableRva))).toBe(true);
  });

  it('are all called by the workload, under their own names', () => {
    const called = new Set(calls.map((call) => call.function));
    for (const site of sites) expect(called.has(site.function), site.function).toBe(true);
  });
});

describe('look-alikes', () => {
  /** What of each hazard can be seen in the instruction and where it reads. */
  const HAZARDS: Record<RefusalHazard, (site: SwitchSite) => boolean> = {
    'not-a-mov': ({ loadRva }) => instructionAt(loadRva).mnemonic === Mnemonic.Movsxd,
    'three-operands': ({ loadRva }) => instructionAt(loadRva).operands.length === 3,
    'destination-is-memory': ({ loadRva }) => instructionAt(loadRva).operands[0]?.kind === 'memory',
    'no-index': ({ loadRva }) => refusedBy(instructionAt(loadRva)) === 'no-index-register',
    'operand-size': ({ loadRva }) => refusedBy(instructionAt(loadRva)) === 'operands-not-4-bytes',
    'too-short': ({ loadRva }) => refusedBy(instructionAt(loadRva)) === 'shorter-than-a-jump',
    scale: ({ loadRva }) => loadAt(loadRva).scale !== DWORD,
    'address-size-prefix': ({ loadRva }) => image.read(loadRva, 1)[0] === 0x67,
    'base-is-not-the-image': ({ loadRva, tableRva }) => loadAt(loadRva).table !== tableRva,
    'table-outside-code': ({ tableRva }) => image.sectionAt(tableRva)?.executable === false,
    pageable: ({ loadRva, tableRva }) =>
      [loadRva, tableRva].some((rva) => image.sectionAt(rva)?.notPaged === false),
    discardable: ({ loadRva }) => image.sectionAt(loadRva)?.discardable === true,
    initkdbg: ({ section }) => section === 'INITKDBG',
    kvascode: ({ section }) => section === 'KVASCODE',
    'system-service-table': ({ tableRva }) => tableRva === profile.symbol('KiServiceTable'),
    'not-a-switch': ({ loadRva }) => loadAt(loadRva).scale === DWORD,
  };

  function refusedBy(instruction: Instruction): string | undefined {
    const verdict = checkCandidate(instruction, 0n, { start: 0n, end: BigInt(image.sizeOfImage) }, undefined);
    return verdict.accepted ? undefined : verdict.reason;
  }

  it.each(lookAlikes.map((site) => [site.name, site.expected, site] as const))(
    '%s is one because of: %s',
    (_name, expected, site) => {
      expect(HAZARDS[expected as RefusalHazard](site)).toBe(true);
    },
  );

  it('there is one for every hazard', () => {
    const present = new Set(lookAlikes.map(({ expected }) => expected));
    expect([...present].sort()).toEqual(Object.keys(HAZARDS).sort());
  });

  it('break every candidate rule that a read of a code page can break', () => {
    const ssdt = profile.symbol('KiServiceTable');
    const range = { start: BigInt(ssdt), end: BigInt(ssdt + 32) };
    const broken = new Set(
      lookAlikes.map(({ loadRva, tableRva }) => {
        const kernel = { start: 0n, end: BigInt(image.sizeOfImage) };
        const verdict = checkCandidate(instructionAt(loadRva), BigInt(tableRva), kernel, range);
        return verdict.accepted ? undefined : verdict.reason;
      }),
    );
    // A MOV has two operands; one to memory or from a register does not read; a read elsewhere does not trap.
    const impossible = new Set([
      'not-two-operands',
      'destination-not-a-register',
      'source-not-memory',
      'not-a-read',
      'read-outside-kernel',
    ]);
    for (const rule of CANDIDATE_RULES) {
      if (!impossible.has(rule)) expect(broken.has(rule), rule).toBe(true);
    }
  });

  it('are proven by the recogniser only where the place alone forbids it', () => {
    const places = new Set<SwitchSite['expected']>(['pageable', 'discardable', 'initkdbg', 'kvascode']);
    for (const { name, loadRva, expected } of lookAlikes) {
      expect(scanned.get(loadRva)?.found ?? false, name).toBe(places.has(expected));
    }
  });
});

describe('the default hooks', () => {
  it('put every table that can be relocated on a trapped page', () => {
    const hooked = new Set(defaultHooks.map((name) => pageOf(profile.symbol(name))));
    for (const { name, tableRva, entries, byteEntries = 0 } of relocatable) {
      for (const page of pagesOf(tableRva, entries * DWORD + byteEntries)) {
        expect(hooked.has(page), `${name}, page ${page.toString(16)}`).toBe(true);
      }
    }
  });

  it('are not more than needed', () => {
    const pages = defaultHooks.map((name) => pageOf(profile.symbol(name)));
    expect(new Set(pages).size).toBe(pages.length);
  });
});

// Builds the NT-like guest: assembles and links native/guest into two PE64 images, the kernel and the HAL that it
// imports from, sets what the linker cannot, and writes the kernel's ISF profile and the list of its switch sites.
//
//   node scripts/build-guest.mjs OUTDIR     writes ntoskrnl.exe, hal.dll, ntoskrnl.json and sites.json there, and
//                                           into pvh/ the HAL and the start-up page of a Xen PVH domain, and the
//                                           code of the guest for the conformance checks on Xen
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const SOURCE = join(dirname(fileURLToPath(import.meta.url)), '../native/guest');
const TOOLS = 'x86_64-w64-mingw32-';
const IMAGE_BASE = 0x140000000;
const PAGE = 0x1000;
const SITES_SECTION = '.sites';
const KERNEL = {
  file: 'ntoskrnl.exe',
  script: 'image.ld',
  entry: 'KiSystemStartup',
  units: [
    'start',
    'scheduler',
    'trap',
    'workload',
    'lexer',
    'modules',
    'imports',
    'integrity',
    'exports',
    'switches',
    'lookalikes',
  ],
};
const HAL = {
  file: 'hal.dll',
  script: 'hal.ld',
  entry: 'DllInitialize',
  units: ['hal', 'platform/embedded'],
};
const PVH_HAL = { ...HAL, units: ['hal', 'platform/pvh'] };
const PVH_START = {
  file: 'start.exe',
  script: 'platform/pvh-start.ld',
  entry: '0',
  imageBase: 0,
  units: ['platform/pvh-start'],
};
/** It runs wherever it is put. */
const PVH_WATCHED = { ...PVH_START, file: 'watched.exe', units: ['platform/watched'] };

// IMAGE_SCN_*: what a section is and how it may be treated.
const CODE = 0x20;
const DATA = 0x40;
const DISCARDABLE = 0x02000000;
const NOT_PAGED = 0x08000000;
const EXECUTE = 0x20000000;
const READ = 0x40000000;
const WRITE = 0x80000000;
const NON_PAGED_CODE = CODE | NOT_PAGED | EXECUTE | READ;

/** As in an NT kernel image; GNU as and ld cannot say "not paged" or "discardable". */
const CHARACTERISTICS = {
  '.text': NON_PAGED_CODE,
  POOLCODE: NON_PAGED_CODE,
  TRACESUP: NON_PAGED_CODE,
  RETPOL: NON_PAGED_CODE,
  MINIEX: NON_PAGED_CODE,
  KVASCODE: NON_PAGED_CODE,
  INITKDBG: NON_PAGED_CODE,
  HALSTART: NON_PAGED_CODE,
  HALCLOCK: NON_PAGED_CODE,
  HALEOI: NON_PAGED_CODE,
  HALPUTC: NON_PAGED_CODE,
  PAGE: CODE | EXECUTE | READ,
  INIT: CODE | DISCARDABLE | EXECUTE | READ,
  '.rdata': DATA | NOT_PAGED | READ,
  '.pdata': DATA | NOT_PAGED | READ,
  '.edata': DATA | READ,
  '.data': DATA | NOT_PAGED | READ | WRITE,
  '.reloc': DATA | DISCARDABLE | READ,
};

function run(tool, args) {
  const { status, error, stdout, stderr } = spawnSync(TOOLS + tool, args, { encoding: 'utf8' });
  if (error) throw new Error(`${TOOLS}${tool} could not be started: ${error.message}`);
  if (status !== 0) throw new Error(`${TOOLS}${tool} failed:\n${stderr}`);
  return stdout;
}

function link({ file, script, entry, imageBase = IMAGE_BASE, units }, directory) {
  const objects = units.map((unit) => {
    const object = join(directory, `${basename(unit)}.o`);
    run('as', ['-I', SOURCE, '-o', object, join(SOURCE, `${unit}.s`)]);
    return object;
  });
  const linked = join(directory, file); // the name goes into the export directory
  run('ld', [
    ...['-T', join(SOURCE, script), '-e', entry, '-o', linked],
    ...['--image-base', `0x${imageBase.toString(16)}`, '--subsystem', 'native'],
    ...['--section-alignment', `${PAGE}`, '--file-alignment', `${PAGE}`],
    ...['--dynamicbase', '--enable-reloc-section', '--disable-auto-import', '--no-insert-timestamp'],
    ...objects,
  ]);
  return linked;
}

/** Addresses relative to the image; without constants and the linker's own names. */
function readSymbols(linked) {
  const symbols = new Map();
  for (const line of run('nm', [linked]).split('\n')) {
    const [address, kind, name] = line.split(' ');
    if (!name || kind.toLowerCase() === 'a' || /^[._]/.test(name) || name in CHARACTERISTICS) continue;
    symbols.set(name, Number(BigInt(`0x${address}`) - BigInt(IMAGE_BASE)));
  }
  return symbols;
}

// --- the image ---------------------------------------------------------------------------------------------------

function sectionsOf(image) {
  const pe = image.readUInt32LE(0x3c);
  const first = pe + 24 + image.readUInt16LE(pe + 20);
  return Array.from({ length: image.readUInt16LE(pe + 6) }, (_, index) => {
    const header = first + index * 40;
    return {
      header,
      name: image.toString('latin1', header, header + 8).replace(/\0+$/, ''),
      virtualSize: image.readUInt32LE(header + 8),
      rva: image.readUInt32LE(header + 12),
      fileSize: image.readUInt32LE(header + 16),
      fileOffset: image.readUInt32LE(header + 20),
    };
  });
}

/** Takes what lies behind the sections out of the image: its symbol table. */
function withoutSymbols(linked) {
  const { fileOffset, fileSize } = sectionsOf(linked).at(-1);
  const image = Buffer.from(linked.subarray(0, fileOffset + fileSize));
  const pe = image.readUInt32LE(0x3c);
  image.writeUInt32LE(0, pe + 8); // where they are
  image.writeUInt32LE(0, pe + 12); // and how many
  return image;
}

/** The bytes of the only section. */
function onlySection(linked) {
  const [{ fileOffset, virtualSize }] = sectionsOf(linked);
  return linked.subarray(fileOffset, fileOffset + virtualSize);
}

/** Takes the last section, the site records, out of the image. */
function takeSiteRecords(linked) {
  const section = sectionsOf(linked).at(-1);
  if (section.name !== SITES_SECTION) throw new Error(`the last section is ${section.name}`);
  const records = linked.subarray(section.fileOffset, section.fileOffset + section.virtualSize);
  const image = Buffer.from(linked.subarray(0, section.fileOffset));
  const pe = image.readUInt32LE(0x3c);
  image.writeUInt16LE(image.readUInt16LE(pe + 6) - 1, pe + 6);
  image.writeUInt32LE(section.rva, pe + 80); // SizeOfImage
  image.fill(0, section.header, section.header + 40);
  return { records, image };
}

/** Sets the characteristics, the import and the debug directory. @returns {{guid: string, age: number, database: string}} */
function finish(image, symbols) {
  const pe = image.readUInt32LE(0x3c);
  const sections = sectionsOf(image);
  for (const { name, header } of sections) {
    if (CHARACTERISTICS[name] === undefined) throw new Error(`nobody says what the section ${name} is`);
    image.writeUInt32LE(CHARACTERISTICS[name] >>> 0, header + 36);
  }
  const fileOffset = (rva) => {
    const section = sections.findLast((candidate) => candidate.rva <= rva);
    return section.fileOffset + rva - section.rva;
  };
  const setDirectory = (number, rva, size) => {
    image.writeUInt32LE(rva, pe + 24 + 112 + number * 8);
    image.writeUInt32LE(size, pe + 24 + 112 + number * 8 + 4);
  };
  const imports = symbols.get('WlImportDirectory');
  if (imports !== undefined) setDirectory(1, imports, symbols.get('WlImportDirectoryEnd') - imports);
  setDirectory(6, symbols.get('WlDebugDirectory'), 28);
  const codeView = fileOffset(symbols.get('WlCodeView'));
  image.writeUInt32LE(codeView, fileOffset(symbols.get('WlDebugDirectory')) + 24);
  image.writeUInt32LE(0, pe + 88); // CheckSum: none
  createHash('sha256')
    .update(image)
    .digest()
    .copy(image, codeView + 4, 0, 16);
  const guid = image.subarray(codeView + 4, codeView + 20);
  const part = (from, to) => Buffer.from(guid.subarray(from, to)).reverse().toString('hex');
  return {
    GUID: (part(0, 4) + part(4, 6) + part(6, 8) + guid.toString('hex', 8)).toUpperCase(),
    age: image.readUInt32LE(codeView + 20),
    database: image.toString('latin1', codeView + 24, image.indexOf(0, codeView + 24)),
  };
}

// --- the ISF profile ---------------------------------------------------------------------------------------------

const integer = (size, signed, kind = 'int') => ({ kind, size, signed, endian: 'little' });
const BASE_TYPES = {
  void: integer(0, false, 'void'),
  'unsigned char': integer(1, false, 'char'),
  'unsigned short': integer(2, false),
  'unsigned long': integer(4, false),
  long: integer(4, true),
  'unsigned long long': integer(8, false),
  pointer: integer(8, false),
};

function isfType(ctype) {
  if (ctype.endsWith('*')) return { kind: 'pointer', subtype: isfType(ctype.slice(0, -1)) };
  const array = /^(.*)\[(\d+)\]$/.exec(ctype);
  if (array) return { kind: 'array', count: Number(array[2]), subtype: isfType(array[1]) };
  return { kind: ctype in BASE_TYPES ? 'base' : 'struct', name: ctype };
}

/** The user types, from the very lines that the assembler takes its offsets from. */
function readUserTypes() {
  const types = {};
  for (const line of readFileSync(join(SOURCE, 'nt-types.inc'), 'utf8').split('\n')) {
    const type = /^type\s+(\w+), (\w+)$/.exec(line);
    if (type) types[type[1]] = { kind: 'struct', size: Number(type[2]), fields: {} };
    const field = /^field\s+(\w+), (\w+), (\w+), "(.*)"$/.exec(line);
    if (field) types[field[1]].fields[field[2]] = { offset: Number(field[3]), type: isfType(field[4]) };
  }
  return types;
}

function makeProfile(pdb, symbols) {
  return {
    metadata: {
      format: '6.2.0',
      producer: { name: 'memtables build-guest', version: '1' },
      windows: { pdb: { ...pdb, machine_type: 0x8664 } },
    },
    base_types: BASE_TYPES,
    user_types: readUserTypes(),
    enums: {},
    symbols: Object.fromEntries([...symbols].sort().map(([name, address]) => [name, { address }])),
  };
}

// --- the sites ---------------------------------------------------------------------------------------------------

const REGISTERS = 'rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15'.split(' ');
const FORMS = [undefined, 'one-level', 'two-level', 'look-alike'];
const GUARDS = ['none', 'cmp', 'and'];

/** The records of native/guest/switch.inc. */
function readSites(records, image) {
  const sections = sectionsOf(image);
  let at = 0;
  const u32 = () => {
    at += 4;
    return records.readUInt32LE(at - 4);
  };
  const text = () => {
    const end = records.indexOf(0, at);
    const value = records.toString('latin1', at, end);
    at = end + 1;
    return value;
  };
  const register = () => REGISTERS[records.readUInt8(at++)];
  const align = () => {
    at = (at + 3) & ~3;
  };

  function site() {
    const form = FORMS[u32()];
    const guard = GUARDS[u32()];
    const [functionRva, loadRva, tableRva, entries] = [u32(), u32(), u32(), u32()];
    const [base, idx, dst, byteIdx] = [register(), register(), register(), register()];
    const byteEntries = u32();
    const bytes = byteEntries > 0 ? { byteLoadRva: u32(), byteTableRva: u32(), byteEntries, byteIdx } : {};
    const [name, functionName, expected] = [text(), text(), text()];
    const section = sections.findLast(({ rva }) => rva <= loadRva).name;
    return {
      ...{
        name,
        form,
        function: functionName,
        functionRva,
        section,
        loadRva,
        tableRva,
        entries,
        base,
        idx,
        dst,
      },
      ...{ ...bytes, guard, expected },
    };
  }

  function call() {
    const [form, range, count] = [FORMS[u32()], u32(), u32()];
    const functionName = text();
    align();
    const switches = Array.from({ length: count }, () => {
      const [id, bias, shift, mask, entries] = [u32(), u32(), u32(), u32(), u32()];
      const [byteEntries, byteRun, bodies, stride] = [u32(), u32(), u32(), u32()];
      return { id, bias, shift, mask, entries, byteEntries, byteRun, bodies, stride };
    });
    return { function: functionName, form, range, switches };
  }

  const result = { sites: [], calls: [], defaultHooks: [], unhookable: [] };
  const readers = [
    undefined,
    () => result.sites.push(site()),
    () => result.calls.push(call()),
    () => result.defaultHooks.push(text()),
    () => result.unhookable.push({ function: text(), reason: text() }),
  ];
  while (at < records.length) {
    const kind = u32();
    if (kind === 0) continue; // between the files' pieces
    readers[kind]();
    align();
  }
  return result;
}

// -----------------------------------------------------------------------------------------------------------------

function linkHal(hal, directory) {
  const linked = link(hal, directory);
  const image = withoutSymbols(readFileSync(linked));
  finish(image, readSymbols(linked));
  return image;
}

function main(output) {
  if (!output) throw new Error('usage: node scripts/build-guest.mjs OUTDIR');
  const work = mkdtempSync(join(tmpdir(), 'memtables-guest-'));
  try {
    const linked = link(KERNEL, work);
    const symbols = readSymbols(linked);
    const { records, image } = takeSiteRecords(withoutSymbols(readFileSync(linked)));
    const pdb = finish(image, symbols);
    const write = (name, value) => writeFileSync(join(output, name), `${JSON.stringify(value, null, 1)}\n`);
    mkdirSync(join(output, 'pvh'), { recursive: true });
    write('ntoskrnl.json', makeProfile(pdb, symbols));
    write('sites.json', readSites(records, image));
    writeFileSync(join(output, KERNEL.file), image);
    writeFileSync(join(output, HAL.file), linkHal(HAL, work));
    writeFileSync(join(output, 'pvh', HAL.file), linkHal(PVH_HAL, work));
    for (const [name, part] of [
      ['start.bin', PVH_START],
      ['watched.bin', PVH_WATCHED],
    ]) {
      writeFileSync(join(output, 'pvh', name), onlySection(readFileSync(link(part, work))));
    }
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

try {
  main(process.argv[2]);
} catch (error) {
  process.stderr.write(`build-guest: ${error.message}\n`);
  process.exitCode = 1;
}

// Builds PE64 files, well formed unless a test asks for something else.

export const FLAGS = {
  code: 0x60000020,
  writableCode: 0xe0000020,
  data: 0x40000040,
  writableData: 0xc0000040,
  discardable: 0x02000000,
  notPaged: 0x08000000,
} as const;

export interface SectionContent {
  readonly name: string;
  readonly rva: number;
  readonly bytes: Uint8Array;
  readonly flags: number;
  /** Default: the length of `bytes`. */
  readonly virtualSize?: number;
}

export interface FileContent {
  readonly sections: readonly SectionContent[];
  /** By directory number. */
  readonly directories?: Readonly<Record<number, { rva: number; size: number }>>;
  /** Default: the end of the last section, in whole pages. */
  readonly sizeOfImage?: number;
}

/** Where the fields lie that hostile files change. */
export const OFFSETS = {
  nt: 0x80,
  file: 0x84,
  optional: 0x98,
  directories: 0x98 + 112,
  sections: 0x98 + 240,
} as const;

const SECTION_HEADER = 40;
const FILE_ALIGNMENT = 0x200;
const PAGE = 0x1000;
const DIRECTORIES = 16;

const align = (value: number, to: number) => Math.ceil(value / to) * to;

export function buildPe({ sections, directories = {}, sizeOfImage }: FileContent): Buffer {
  const headers = Buffer.alloc(align(OFFSETS.sections + sections.length * SECTION_HEADER, FILE_ALIGNMENT));
  headers.writeUInt16LE(0x5a4d, 0);
  headers.writeUInt32LE(OFFSETS.nt, 0x3c);
  headers.writeUInt32LE(0x4550, OFFSETS.nt);
  headers.writeUInt16LE(0x8664, OFFSETS.file);
  headers.writeUInt16LE(sections.length, OFFSETS.file + 2);
  headers.writeUInt32LE(0x5f000000, OFFSETS.file + 4);
  headers.writeUInt16LE(240, OFFSETS.file + 16);
  headers.writeUInt16LE(0x22, OFFSETS.file + 18);
  headers.writeUInt16LE(0x20b, OFFSETS.optional);
  headers.writeUInt32LE(sections[0]?.rva ?? 0, OFFSETS.optional + 16);
  headers.writeBigUInt64LE(0x1_4000_0000n, OFFSETS.optional + 24);
  headers.writeUInt32LE(PAGE, OFFSETS.optional + 32);
  headers.writeUInt32LE(FILE_ALIGNMENT, OFFSETS.optional + 36);
  const ends = sections.map(({ rva, bytes, virtualSize }) => rva + (virtualSize ?? bytes.length));
  headers.writeUInt32LE(sizeOfImage ?? align(Math.max(PAGE, ...ends), PAGE), OFFSETS.optional + 56);
  headers.writeUInt32LE(headers.length, OFFSETS.optional + 60);
  headers.writeUInt16LE(1, OFFSETS.optional + 68);
  headers.writeUInt32LE(DIRECTORIES, OFFSETS.optional + 108);
  for (const [index, { rva, size }] of Object.entries(directories)) {
    headers.writeUInt32LE(rva, OFFSETS.directories + Number(index) * 8);
    headers.writeUInt32LE(size, OFFSETS.directories + Number(index) * 8 + 4);
  }

  const pieces: Buffer[] = [headers];
  let position = headers.length;
  sections.forEach(({ name, rva, bytes, flags, virtualSize }, index) => {
    const at = OFFSETS.sections + index * SECTION_HEADER;
    const raw = Buffer.alloc(align(bytes.length, FILE_ALIGNMENT));
    raw.set(bytes);
    headers.write(name, at, 8, 'latin1');
    headers.writeUInt32LE(virtualSize ?? bytes.length, at + 8);
    headers.writeUInt32LE(rva, at + 12);
    headers.writeUInt32LE(raw.length, at + 16);
    headers.writeUInt32LE(position, at + 20);
    headers.writeUInt32LE(flags, at + 36);
    pieces.push(raw);
    position += raw.length;
  });
  return Buffer.concat(pieces);
}

/** A RUNTIME_FUNCTION. */
export interface FunctionEntry {
  readonly begin: number;
  readonly end: number;
  /** The entry that its unwind data continues. */
  readonly chainedTo?: FunctionEntry;
  /** Where the `__except` blocks of its C scope table begin. */
  readonly handlers?: readonly number[];
}

/** Contents of `.pdata` (the table, in ascending order) and of what it points to, put at `rva`. */
export function buildUnwindData(
  functions: readonly FunctionEntry[],
  rva: number,
): { bytes: Buffer; directory: { rva: number; size: number } } {
  const sorted = [...functions].sort((a, b) => a.begin - b.begin);
  const size = sorted.length * 12;
  const unwind: Buffer[] = [];
  const places = new Map<FunctionEntry, number>();
  let next = align(rva + size, 4);
  const place = (entry: FunctionEntry): number => {
    const known = places.get(entry);
    if (known !== undefined) return known;
    const chain = entry.chainedTo && record(entry.chainedTo);
    const info = chain ? Buffer.concat([Buffer.of(0x21, 0, 0, 0), chain]) : unwindInfo(entry);
    places.set(entry, next);
    next += info.length;
    unwind.push(info);
    return places.get(entry)!;
  };
  const record = (entry: FunctionEntry): Buffer => {
    const bytes = Buffer.alloc(12);
    bytes.writeUInt32LE(entry.begin, 0);
    bytes.writeUInt32LE(entry.end, 4);
    bytes.writeUInt32LE(place(entry), 8);
    return bytes;
  };
  const table = Buffer.concat(sorted.map(record));
  const padding = Buffer.alloc(align(rva + size, 4) - rva - size);
  return { bytes: Buffer.concat([table, padding, ...unwind]), directory: { rva, size } };
}

function unwindInfo({ begin, end, handlers }: FunctionEntry): Buffer {
  if (handlers === undefined) return Buffer.of(1, 0, 0, 0);
  const bytes = Buffer.alloc(12 + handlers.length * 16);
  bytes.writeUInt8(1 | (1 << 3), 0); // with an exception handler
  bytes.writeUInt32LE(begin, 4); // the handler itself is not looked at
  bytes.writeUInt32LE(handlers.length, 8);
  handlers.forEach((target, index) => {
    [begin, end, 1, target].forEach((value, field) => {
      bytes.writeUInt32LE(value, 12 + index * 16 + field * 4);
    });
  });
  return bytes;
}

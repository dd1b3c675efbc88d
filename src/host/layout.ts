import { MemtablesError } from '../errors.js';

/** One member of a little-endian C structure. */
export interface Field<T> {
  readonly offset: number;
  readonly size: number;
  read(bytes: Buffer, at: number): T;
  write(bytes: Buffer, at: number, value: T): void;
}

/** The members of a layout, by name. */
// biome-ignore lint/suspicious/noExplicitAny: a field of any type; the value types are inferred from it.
export type Fields = Readonly<Record<string, Field<any>>>;
/** The values of a layout's members. */
export type Values<F extends Fields> = { [K in keyof F]: F[K] extends Field<infer T> ? T : never };

/** The values a layout holds. */
export type ValuesOf<L> = L extends Layout<infer F> ? Values<F> : never;

export const u8 = (offset: number): Field<number> => ({
  offset,
  size: 1,
  read: (bytes, at) => bytes.readUInt8(at),
  write: (bytes, at, value) => bytes.writeUInt8(value, at),
});

export const u16 = (offset: number): Field<number> => ({
  offset,
  size: 2,
  read: (bytes, at) => bytes.readUInt16LE(at),
  write: (bytes, at, value) => bytes.writeUInt16LE(value, at),
});

export const u32 = (offset: number): Field<number> => ({
  offset,
  size: 4,
  read: (bytes, at) => bytes.readUInt32LE(at),
  write: (bytes, at, value) => bytes.writeUInt32LE(value, at),
});

export const i32 = (offset: number): Field<number> => ({
  offset,
  size: 4,
  read: (bytes, at) => bytes.readInt32LE(at),
  write: (bytes, at, value) => bytes.writeInt32LE(value, at),
});

export const u64 = (offset: number): Field<bigint> => ({
  offset,
  size: 8,
  read: (bytes, at) => bytes.readBigUInt64LE(at),
  write: (bytes, at, value) => bytes.writeBigUInt64LE(value, at),
});

/** A fixed array of bytes; a shorter value leaves the rest zero. */
export const bytes = (offset: number, size: number): Field<Uint8Array> => ({
  offset,
  size,
  read: (buffer, at) => buffer.subarray(at, at + size),
  write: (buffer, at, value) => buffer.set(value.subarray(0, size), at),
});

/** A structure inside a structure. */
export const nested = <F extends Fields>(offset: number, layout: Layout<F>): Field<Values<F>> => ({
  offset,
  size: layout.size,
  read: (buffer, at) => layout.decode(buffer, at),
  write: (buffer, at, value) => layout.encodeInto(buffer, at, value),
});

/** A C structure: its size and where its members lie. Every byte that no member covers is padding. */
export class Layout<F extends Fields> {
  private readonly members: readonly [keyof F & string, Field<unknown>][];

  constructor(
    readonly size: number,
    readonly fields: F,
  ) {
    this.members = Object.entries(fields);
  }

  /** The members that `values` leaves out are zero, as is the padding. */
  encode(values: Partial<Values<F>>): Buffer {
    const buffer = Buffer.alloc(this.size);
    this.encodeInto(buffer, 0, values);
    return buffer;
  }

  /** Writes the given members; touches nothing else of `buffer`. */
  encodeInto(buffer: Buffer, at: number, values: Partial<Values<F>>): void {
    for (const [name, field] of this.members) {
      const value = values[name];
      if (value !== undefined) field.write(buffer, at + field.offset, value);
    }
  }

  /** @throws MemtablesError `PROTOCOL_VIOLATION` when `buffer` ends before the structure does */
  decode(buffer: Buffer, at = 0): Values<F> {
    if (at + this.size > buffer.length) {
      throw new MemtablesError(
        'PROTOCOL_VIOLATION',
        `a message of ${buffer.length} bytes is too short: ${at + this.size} are needed`,
        {
          remedy: 'Check that both ends speak the same version of the protocol.',
          context: { have: buffer.length, need: at + this.size },
        },
      );
    }
    const values: Record<string, unknown> = {};
    for (const [name, field] of this.members) values[name] = field.read(buffer, at + field.offset);
    return values as Values<F>;
  }

  /** True when every byte of the structure at `at` that no member covers is zero. */
  paddingIsZero(buffer: Buffer, at = 0): boolean {
    const rest = Buffer.from(buffer.subarray(at, at + this.size));
    for (const [, field] of this.members) rest.fill(0, field.offset, field.offset + field.size);
    return rest.every((byte) => byte === 0);
  }
}

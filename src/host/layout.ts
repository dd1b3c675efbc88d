import { MemtablesError } from '../errors.js';

/** One member of a little-endian C structure. A view, because its 64-bit accesses are many times a Buffer's. */
export interface Field<T> {
  readonly offset: number;
  readonly size: number;
  read(view: DataView, at: number): T;
  write(view: DataView, at: number, value: T): void;
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
  read: (view, at) => view.getUint8(at),
  write: (view, at, value) => view.setUint8(at, value),
});

export const u16 = (offset: number): Field<number> => ({
  offset,
  size: 2,
  read: (view, at) => view.getUint16(at, true),
  write: (view, at, value) => view.setUint16(at, value, true),
});

export const u32 = (offset: number): Field<number> => ({
  offset,
  size: 4,
  read: (view, at) => view.getUint32(at, true),
  write: (view, at, value) => view.setUint32(at, value, true),
});

export const i32 = (offset: number): Field<number> => ({
  offset,
  size: 4,
  read: (view, at) => view.getInt32(at, true),
  write: (view, at, value) => view.setInt32(at, value, true),
});

export const u64 = (offset: number): Field<bigint> => ({
  offset,
  size: 8,
  read: (view, at) => view.getBigUint64(at, true),
  write: (view, at, value) => view.setBigUint64(at, value, true),
});

/** A fixed array of bytes; a shorter value leaves the rest as it is. */
export const bytes = (offset: number, size: number): Field<Uint8Array> => ({
  offset,
  size,
  read: (view, at) => Buffer.from(view.buffer, view.byteOffset + at, size),
  write: (view, at, value) =>
    new Uint8Array(view.buffer, view.byteOffset + at, size).set(value.subarray(0, size)),
});

/** A structure inside a structure. */
export const nested = <F extends Fields>(offset: number, layout: Layout<F>): Field<Values<F>> => ({
  offset,
  size: layout.size,
  read: (view, at) => layout.read(view, at),
  write: (view, at, value) => layout.write(view, at, value),
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
    this.write(viewOf(buffer), 0, values);
    return buffer;
  }

  /** Writes the given members and touches nothing else. */
  write(view: DataView, at: number, values: Partial<Values<F>>): void {
    for (const [name, field] of this.members) {
      const value = values[name];
      if (value !== undefined) field.write(view, at + field.offset, value);
    }
  }

  /** @throws MemtablesError `PROTOCOL_VIOLATION` when `buffer` ends before the structure does */
  decode(buffer: Uint8Array, at = 0): Values<F> {
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
    return this.read(viewOf(buffer), at);
  }

  /** The members at `at`; the caller has checked that the view is long enough. */
  read(view: DataView, at: number): Values<F> {
    const values: Record<string, unknown> = {};
    for (const [name, field] of this.members) values[name] = field.read(view, at + field.offset);
    return values as Values<F>;
  }

  /** True when every byte of the structure at `at` that no member covers is zero. */
  paddingIsZero(buffer: Buffer, at = 0): boolean {
    const rest = Buffer.from(buffer.subarray(at, at + this.size));
    for (const [, field] of this.members) rest.fill(0, field.offset, field.offset + field.size);
    return rest.every((byte) => byte === 0);
  }
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

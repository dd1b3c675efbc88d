import { GPR_NAMES } from '../x86/registers.js';

/** Bits of an operand. */
export type Width = 8 | 16 | 32 | 64;
const WIDTHS: readonly Width[] = [8, 16, 32, 64];

/** Where a quantity came from, when that matters to a switch. */
export type Origin =
  /** The address `ImageBase + rva`. */
  | { readonly kind: 'address'; readonly rva: number }
  /** What the byte load at `load` brought. */
  | { readonly kind: 'byte'; readonly load: number }
  /** What the dword load at `load` brought from one of the table's first `entries` entries. */
  | { readonly kind: 'entry'; readonly load: number; readonly entries: number }
  /** ImageBase plus such an entry. */
  | { readonly kind: 'target'; readonly load: number; readonly entries: number };

/** What is known of one 64-bit number. */
interface Quantity {
  /** Upper bounds (unsigned) of its low 8, 16, 32 and 64 bits. */
  readonly max: readonly number[];
  /** The value of its low `width` bits, where that is known. */
  readonly exact: { readonly width: Width; readonly value: number } | undefined;
  readonly origin: Origin | undefined;
}

/**
 * A register's content: the low `width` bits of a quantity, zero- or sign-extended. Registers that show the
 * same quantity are known to be equal, so that a compare of one bounds the others.
 */
export interface View {
  readonly quantity: number;
  readonly width: Width;
  readonly signed: boolean;
}

/** What the flags were set from. */
export type Flags =
  /** `left` was compared with a number of at most `limit`, or exactly that (both of `width` bits, unsigned). */
  | {
      readonly kind: 'compare';
      readonly left: View;
      readonly width: Width;
      readonly limit: number;
      readonly exact: boolean;
    }
  /** `left` was tested with a mask; when the result is zero, it is at most `limit`. */
  | { readonly kind: 'test'; readonly left: View; readonly width: Width; readonly limit: number };

export type Relation = 'below' | 'below-or-equal' | 'equal' | 'less' | 'less-or-equal' | 'nonnegative';

/** Bounds above this are as good as none, and stay exact as JavaScript numbers. */
const MAX_BOUND = 2 ** 32 - 1;

export function widthMax(width: Width): number {
  return width === 64 ? Number.POSITIVE_INFINITY : 2 ** width - 1;
}

const UNKNOWN: readonly number[] = WIDTHS.map(widthMax);

/** Of the low 8, 16, 32 and 64 bits of a number of `width` bits that is at most `max`. */
function boundsOf(width: Width, max: number): readonly number[] {
  if (max === Number.POSITIVE_INFINITY) return UNKNOWN;
  const index = WIDTHS.indexOf(width);
  return UNKNOWN.map((own, at) => (at >= index || max < 2 ** WIDTHS[at]! ? Math.min(own, max) : own));
}
const RSP = 4;

/** Compiled functions have fewer that matter. */
const MAX_SLOTS = 128;

/** A slot of the stack frame, keyed by its offset from RSP. */
interface Slot {
  readonly view: View;
  readonly width: Width;
}

/**
 * What is known at one point of a function, whatever way led there. Equality is kept by sharing quantities,
 * which are numbered within one state only: merging two states pairs them up.
 */
export class State {
  private readonly registers: View[];
  private readonly quantities: Quantity[];
  private slots: Map<number, Slot>;
  flags: Flags | undefined;

  private constructor(
    registers: View[],
    quantities: Quantity[],
    slots: Map<number, Slot>,
    flags: Flags | undefined,
  ) {
    this.registers = registers;
    this.quantities = quantities;
    this.slots = slots;
    this.flags = flags;
  }

  /** Nothing is known. */
  static unknown(): State {
    const state = new State([], [], new Map(), undefined);
    for (let register = 0; register < GPR_NAMES.length; register++) state.set(register, state.fresh(64));
    return state;
  }

  clone(): State {
    return new State([...this.registers], [...this.quantities], new Map(this.slots), this.flags);
  }

  /** Forgets everything. */
  forget(): void {
    for (let register = 0; register < GPR_NAMES.length; register++) this.clobber(register);
    this.flags = undefined;
  }

  get quantityCount(): number {
    return this.quantities.length;
  }

  get slotCount(): number {
    return this.slots.size;
  }

  // Quantities and views

  /** A new unknown of `width` bits, at most `max`. */
  fresh(width: Width, max = Number.POSITIVE_INFINITY, origin?: Origin): View {
    this.quantities.push({ max: boundsOf(width, max), exact: undefined, origin });
    return { quantity: this.quantities.length - 1, width, signed: false };
  }

  /** The number `value`, which has to fit into 32 bits, in `width` bits. */
  constant(value: number, width: Width): View {
    const view = this.fresh(width, value);
    this.quantities[view.quantity] = { ...this.quantities[view.quantity]!, exact: { width: 64, value } };
    return view;
  }

  address(rva: number): View {
    return this.fresh(64, Number.POSITIVE_INFINITY, { kind: 'address', rva });
  }

  /** Unsigned upper bound of what `view` shows, seen as a number of `width` bits; infinite when unknown. */
  bound(view: View, width: Width = 64): number {
    const { max } = this.quantities[view.quantity]!;
    const own = WIDTHS.indexOf(view.width);
    let bound = UNKNOWN[own]!;
    // More bits bound fewer; fewer bits bound more where the rest is known to be zero.
    for (let at = own; at < WIDTHS.length; at++) bound = Math.min(bound, max[at]!);
    for (let at = own - 1; at >= 0; at--) if (bound < 2 ** WIDTHS[at]!) bound = Math.min(bound, max[at]!);
    if (view.signed && width > view.width && bound >= 2 ** (view.width - 1)) bound = widthMax(width);
    return bound > MAX_BOUND ? Number.POSITIVE_INFINITY : Math.min(bound, widthMax(width));
  }

  /** The value of `view`, where it is known and not negative. */
  exact(view: View): number | undefined {
    const { exact } = this.quantities[view.quantity]!;
    if (exact === undefined || exact.width < view.width) return undefined;
    const value = view.width === 64 ? exact.value : exact.value % 2 ** view.width;
    return view.signed && value >= 2 ** (view.width - 1) ? undefined : value;
  }

  origin(view: View): Origin | undefined {
    const { origin } = this.quantities[view.quantity]!;
    // An entry is 32 bits; addresses need all 64.
    const width = origin?.kind === 'entry' ? 32 : origin?.kind === 'byte' ? 8 : 64;
    return !view.signed && view.width >= width ? origin : undefined;
  }

  /** Notes that what `view` shows, as an unsigned number, is at most `max`. */
  private limit(view: View, max: number): void {
    if (view.signed && max >= 2 ** (view.width - 1)) return;
    const index = WIDTHS.indexOf(view.width);
    const quantity = this.quantities[view.quantity]!;
    if (quantity.max[index]! <= max) return;
    this.quantities[view.quantity] = {
      ...quantity,
      max: quantity.max.map((own, at) => (at === index ? max : own)),
    };
  }

  // Registers

  get(register: number): View {
    return this.registers[register]!;
  }

  set(register: number, view: View): void {
    this.registers[register] = view;
    if (register === RSP) this.slots.clear();
  }

  /** The low `width` bits of `view` as a number of that many bits. */
  low(view: View, width: Width): View {
    return width > view.width ? view : { quantity: view.quantity, width, signed: false };
  }

  /** Writes a number of `width` bits, as the processor does: 32 bits clear the rest, 8 and 16 keep it. */
  write(register: number, width: Width, view: View): void {
    if (width >= 32) {
      if (width === 32 && view.signed && view.width < 32) {
        // The upper half is zero, so this is no extension of the quantity any more.
        this.set(register, this.fresh(32, this.bound(view, 32)));
      } else this.set(register, this.low(view, width));
      return;
    }
    const bound = this.bound(view, width);
    const before = this.bound(this.get(register));
    this.set(register, this.fresh(64, before <= widthMax(width) ? bound : undefined));
    this.limit(this.low(this.get(register), width), bound);
  }

  /** Forgets a register. */
  clobber(register: number): void {
    this.set(register, this.fresh(64));
  }

  // The stack frame

  slot(offset: number, width: Width): View {
    const slot = this.slots.get(offset);
    if (slot !== undefined && slot.width >= width) return this.low(slot.view, width);
    const view = this.fresh(width);
    this.setSlot(offset, width, view);
    return view;
  }

  setSlot(offset: number, width: Width, view: View): void {
    this.forgetSlots(offset, width / 8);
    // A narrower sign extension is not the slot's content; keep only how large it can be.
    const content = view.signed && view.width < width ? this.fresh(width, this.bound(view, width)) : view;
    if (this.slots.size >= MAX_SLOTS) this.slots.clear();
    this.slots.set(offset, { view: this.low(content, width), width });
  }

  forgetSlots(offset: number, length: number): void {
    for (const [at, slot] of this.slots) {
      if (at < offset + length && offset < at + slot.width / 8) this.slots.delete(at);
    }
  }

  forgetAllSlots(): void {
    this.slots.clear();
  }

  // Conditions

  /** Notes what the flags say when `relation` holds between what they were set from. */
  assume(relation: Relation): void {
    const { flags } = this;
    if (flags === undefined) return;
    const limit = this.limitUnder(flags, relation);
    if (limit === undefined) return;
    this.limit(flags.left, Math.max(limit, 0));
    if (relation === 'equal' && (flags.kind === 'compare' ? flags.exact : limit === 0)) {
      this.fix(flags.left, limit);
    }
  }

  /** Notes that `view` shows exactly `value`. */
  private fix(view: View, value: number): void {
    if (value > widthMax(view.width) || (view.signed && value >= 2 ** (view.width - 1))) return;
    const quantity = this.quantities[view.quantity]!;
    if ((quantity.exact?.width ?? 0) >= view.width) return;
    this.quantities[view.quantity] = { ...quantity, exact: { width: view.width, value } };
  }

  /** The bound of `view`, of `width` bits, if `relation` held. */
  boundUnder(view: View, width: Width, relation: Relation): number {
    const copy = this.clone();
    copy.assume(relation);
    return copy.bound(view, width);
  }

  private limitUnder(flags: Flags, relation: Relation): number | undefined {
    const { left, width, limit } = flags;
    const half = 2 ** (width - 1);
    if (relation === 'nonnegative') {
      // A limit of 0 is a compare with 0 or a test of the number with itself: the sign is the number's own.
      return limit === 0 && width < 64 ? half - 1 : undefined;
    }
    if (flags.kind === 'test') return relation === 'equal' ? limit : undefined;
    switch (relation) {
      case 'below':
        return limit - 1;
      case 'below-or-equal':
      case 'equal':
        return limit;
      default: {
        // Between numbers that are not negative, a signed compare is an unsigned one.
        if (limit >= half || this.bound(left, width) >= half) return undefined;
        return relation === 'less' ? limit - 1 : limit;
      }
    }
  }

  // Merging

  /** What is known when either this state or `other` may be the case. */
  merge(other: State): State {
    const merged = new State([], [], new Map(), undefined);
    const pairs = new Map<number | string, number>();
    const pair = (a: View, b: View): View => {
      const same = a.width === b.width && a.signed === b.signed;
      const key = same
        ? a.quantity * 2 ** 26 + b.quantity
        : `${a.quantity}.${a.width}${a.signed}/${b.quantity}.${b.width}${b.signed}`;
      let quantity = pairs.get(key);
      if (quantity === undefined) {
        quantity = same
          ? merged.add(mergeQuantities(this.quantities[a.quantity]!, other.quantities[b.quantity]!))
          : merged.fresh(64, Math.max(this.bound(a), other.bound(b))).quantity;
        pairs.set(key, quantity);
      }
      return same ? { quantity, width: a.width, signed: a.signed } : { quantity, width: 64, signed: false };
    };
    this.registers.forEach((view, register) => {
      merged.registers[register] = pair(view, other.registers[register]!);
    });
    for (const [offset, slot] of this.slots) {
      const twin = other.slots.get(offset);
      if (twin?.width !== slot.width) continue;
      const alike = twin.view.width === slot.view.width && twin.view.signed === slot.view.signed;
      if (alike) merged.slots.set(offset, { view: pair(slot.view, twin.view), width: slot.width });
    }
    const [a, b] = [this.flags, other.flags];
    if (
      a !== undefined &&
      b !== undefined &&
      a.kind === b.kind &&
      a.width === b.width &&
      a.left.width === b.left.width &&
      a.left.signed === b.left.signed
    ) {
      const left = pair(a.left, b.left);
      const limit = Math.max(a.limit, b.limit);
      if (a.kind === 'test') merged.flags = { ...a, left, limit };
      else if (b.kind === 'compare') {
        merged.flags = { ...a, left, limit, exact: a.exact && b.exact && a.limit === b.limit };
      }
    }
    return merged.canonical();
  }

  /** The same state with quantities numbered in the order of their first use, and no unused ones. */
  canonical(): State {
    const numbers = new Map<number, number>();
    const result = new State([], [], new Map(), undefined);
    const renumber = (view: View): View => {
      let number = numbers.get(view.quantity);
      if (number === undefined) {
        number = result.add(this.quantities[view.quantity]!);
        numbers.set(view.quantity, number);
      }
      return number === view.quantity ? view : { ...view, quantity: number };
    };
    this.registers.forEach((view, register) => {
      result.registers[register] = renumber(view);
    });
    const offsets = [...this.slots.keys()].sort((a, b) => a - b);
    for (const offset of offsets) {
      const slot = this.slots.get(offset)!;
      result.slots.set(offset, { view: renumber(slot.view), width: slot.width });
    }
    if (this.flags !== undefined) result.flags = { ...this.flags, left: renumber(this.flags.left) };
    return result;
  }

  /** Whether two canonical states say the same. */
  equals(other: State): boolean {
    return (
      this.quantities.length === other.quantities.length &&
      this.slots.size === other.slots.size &&
      this.registers.every((view, register) => sameView(view, other.registers[register]!)) &&
      this.quantities.every((quantity, index) => sameQuantity(quantity, other.quantities[index]!)) &&
      [...this.slots].every(([offset, slot]) => {
        const twin = other.slots.get(offset);
        return twin !== undefined && twin.width === slot.width && sameView(slot.view, twin.view);
      }) &&
      sameFlags(this.flags, other.flags)
    );
  }

  private add(quantity: Quantity): number {
    return this.quantities.push(quantity) - 1;
  }
}

function sameView(a: View, b: View): boolean {
  return a.quantity === b.quantity && a.width === b.width && a.signed === b.signed;
}

function sameQuantity(a: Quantity, b: Quantity): boolean {
  return a === b || (sameBounds(a.max, b.max) && sameExact(a, b) && sameOrigin(a.origin, b.origin));
}

function sameBounds(a: readonly number[], b: readonly number[]): boolean {
  return a === b || a.every((max, index) => max === b[index]);
}

function sameOrigin(a: Origin | undefined, b: Origin | undefined): boolean {
  if (a === b) return true;
  const merged = mergeOrigins(a, b);
  if (a === undefined || b === undefined || merged === undefined) return false;
  return !('entries' in a && 'entries' in b) || a.entries === b.entries;
}

function sameFlags(a: Flags | undefined, b: Flags | undefined): boolean {
  if (a === undefined || b === undefined) return a === b;
  return (
    a.kind === b.kind &&
    a.width === b.width &&
    a.limit === b.limit &&
    sameView(a.left, b.left) &&
    (a.kind === 'compare' && b.kind === 'compare' ? a.exact === b.exact : true)
  );
}

function mergeQuantities(a: Quantity, b: Quantity): Quantity {
  if (a === b) return a;
  return {
    max: sameBounds(a.max, b.max) ? a.max : a.max.map((max, index) => Math.max(max, b.max[index]!)),
    exact: sameExact(a, b) ? a.exact : undefined,
    origin: mergeOrigins(a.origin, b.origin),
  };
}

function sameExact({ exact: a }: Quantity, { exact: b }: Quantity): boolean {
  return a?.width === b?.width && a?.value === b?.value;
}

function mergeOrigins(a: Origin | undefined, b: Origin | undefined): Origin | undefined {
  if (a === undefined || b === undefined || a.kind !== b.kind) return undefined;
  switch (a.kind) {
    case 'address':
      return a.rva === (b as typeof a).rva ? a : undefined;
    case 'byte':
      return a.load === (b as typeof a).load ? a : undefined;
    default: {
      const twin = b as typeof a;
      return a.load === twin.load ? { ...a, entries: Math.max(a.entries, twin.entries) } : undefined;
    }
  }
}

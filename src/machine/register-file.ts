// The registers as one array, in the order of native/machine/registers.h.
import { GPR_NAMES, type Registers } from '../x86/registers.js';

const ORDER: readonly (keyof Registers)[] = [
  ...GPR_NAMES,
  'rip',
  'rflags',
  'cr0',
  'cr2',
  'cr3',
  'cr4',
  'efer',
  'lstar',
  'fsBase',
  'gsBase',
  'shadowGs',
  'cs',
  'ss',
  'trBase',
  'idtrBase',
  'gdtrBase',
];

export const REGISTER_COUNT = ORDER.length;

export function fromRegisterFile(file: BigUint64Array): Registers {
  return Object.fromEntries(ORDER.map((name, index) => [name, file[index]])) as unknown as Registers;
}

/** `set` has a bit for each register that was given. */
export function toRegisterFile(registers: Partial<Registers>): { file: BigUint64Array; set: number } {
  const file = new BigUint64Array(REGISTER_COUNT);
  let set = 0;
  ORDER.forEach((name, index) => {
    const value = registers[name];
    if (value === undefined) return;
    file[index] = value;
    set |= 1 << index;
  });
  return { file, set: set >>> 0 };
}

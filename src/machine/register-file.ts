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

/** Spelled out because it runs for every trap: going through `ORDER` takes several times as long. */
export function fromRegisterFile(file: BigUint64Array): Registers {
  return {
    rax: file[0]!,
    rcx: file[1]!,
    rdx: file[2]!,
    rbx: file[3]!,
    rsp: file[4]!,
    rbp: file[5]!,
    rsi: file[6]!,
    rdi: file[7]!,
    r8: file[8]!,
    r9: file[9]!,
    r10: file[10]!,
    r11: file[11]!,
    r12: file[12]!,
    r13: file[13]!,
    r14: file[14]!,
    r15: file[15]!,
    rip: file[16]!,
    rflags: file[17]!,
    cr0: file[18]!,
    cr2: file[19]!,
    cr3: file[20]!,
    cr4: file[21]!,
    efer: file[22]!,
    lstar: file[23]!,
    fsBase: file[24]!,
    gsBase: file[25]!,
    shadowGs: file[26]!,
    cs: file[27]!,
    ss: file[28]!,
    trBase: file[29]!,
    idtrBase: file[30]!,
    gdtrBase: file[31]!,
  };
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

// A vCPU's registers as KVM's structures hold them.
import type { Registers } from '../x86/registers.js';
import type { EventMsrs, KvmRegs, KvmSregs } from './kvmi-wire.js';

type Segment = KvmSregs['cs'];

const FLAT_LIMIT = 0xffffffff;
const CODE_READ_ACCESSED = 11;
const DATA_WRITE_ACCESSED = 3;
const BUSY_TSS = 11;
const TSS_LIMIT = 0x67;
const IDT_LIMIT = 0xfff;
const GDT_LIMIT = 0x7f;

const EFER_LMA = 1n << 10n;
/** What KVM reports as a vCPU's mode: the bytes of its natural operand. */
const MODE_LONG = 8;
const MODE_PROTECTED = 4;

export function kvmMode(registers: Pick<Registers, 'efer'>): number {
  return (registers.efer & EFER_LMA) !== 0n ? MODE_LONG : MODE_PROTECTED;
}

export function kvmRegsOf(registers: Registers): KvmRegs {
  return registers;
}

/** The machine keeps no descriptor caches: the flat 64-bit segments that a kernel in long mode has. */
export function kvmSregsOf(registers: Registers): KvmSregs {
  const data = segment(0n, registers.ss, { type: DATA_WRITE_ACCESSED, db: 1 });
  return {
    cs: segment(0n, registers.cs, { type: CODE_READ_ACCESSED, l: 1 }),
    ds: data,
    es: data,
    fs: segment(registers.fsBase, registers.ss, { type: DATA_WRITE_ACCESSED, db: 1 }),
    gs: segment(registers.gsBase, registers.ss, { type: DATA_WRITE_ACCESSED, db: 1 }),
    ss: data,
    tr: { ...ABSENT, base: registers.trBase, limit: TSS_LIMIT, type: BUSY_TSS, present: 1 },
    ldt: ABSENT,
    gdt: { base: registers.gdtrBase, limit: GDT_LIMIT },
    idt: { base: registers.idtrBase, limit: IDT_LIMIT },
    cr0: registers.cr0,
    cr2: registers.cr2,
    cr3: registers.cr3,
    cr4: registers.cr4,
    cr8: 0n,
    efer: registers.efer,
    apicBase: 0n,
  };
}

/** The MSRs every event carries, as far as the machine keeps them with the registers; the others read as zero. */
export function eventMsrsOf(registers: Registers): EventMsrs {
  return {
    sysenterCs: 0n,
    sysenterEsp: 0n,
    sysenterEip: 0n,
    efer: registers.efer,
    star: 0n,
    lstar: registers.lstar,
    cstar: 0n,
    pat: 0n,
    shadowGs: registers.shadowGs,
  };
}

const ABSENT: Segment = {
  base: 0n,
  limit: 0,
  selector: 0,
  type: 0,
  present: 0,
  dpl: 0,
  db: 0,
  s: 0,
  l: 0,
  g: 0,
};

function segment(base: bigint, selector: bigint, kind: Partial<Segment>): Segment {
  const low = Number(selector & 0xffffn);
  return { ...ABSENT, base, limit: FLAT_LIMIT, selector: low, present: 1, dpl: low & 3, s: 1, g: 1, ...kind };
}

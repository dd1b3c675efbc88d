// A guest of a few bytes on the real machine: long mode, one 2 MB page, a loop that reads.
import { createMachine } from '../../src/machine/create-machine.js';
import type { Machine } from '../../src/machine/machine.js';

const MEMORY_BYTES = 4 * 1024 * 1024;
const PML4 = 0x1000;
const PDPT = 0x2000;
const PD = 0x3000;
const PRESENT_WRITABLE = 3n;
const LARGE = 0x80n;
const SYSTEM = { cr0: 0x80050033n, cr3: BigInt(PML4), cr4: 0x6a0n, efer: 0xd01n };

/** Where each vCPU's code begins; memory is mapped at its own address. */
export const CODE = 0x10000n;
/** A frame with data of its own, which the code may be made to read. */
export const DATA = 0x20000n;
/** What `DATA` holds. */
export const SECRET = Buffer.from('11223344556677889900aabbccddeeff', 'hex');

/** A machine with `vcpus` vCPUs that all begin at `code`, RBX at DATA and every other register 0. */
export function tinyGuest(code: string, vcpus = 1): Machine {
  const machine = createMachine({ vcpus, memoryBytes: MEMORY_BYTES });
  const entry = (table: number, value: bigint) => {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64LE(value | PRESENT_WRITABLE);
    machine.writePhysical(BigInt(table), bytes);
  };
  entry(PML4, BigInt(PDPT));
  entry(PDPT, BigInt(PD));
  entry(PD, LARGE);
  machine.writePhysical(CODE, Buffer.from(code, 'hex'));
  machine.writePhysical(DATA, SECRET);
  for (let vcpu = 0; vcpu < vcpus; vcpu++) {
    machine.setRegisters(vcpu, { ...SYSTEM, rip: CODE, rbx: DATA, rflags: 2n, cs: 0x10n, ss: 0x18n });
  }
  return machine;
}

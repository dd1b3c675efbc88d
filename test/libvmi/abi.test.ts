import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import * as abi from '../../src/libvmi/abi.js';

/** What each C expression must be, by libvmi's own names. */
const EXPECTED: Readonly<Record<string, number>> = {
  VMI_EVENTS_VERSION: abi.EVENTS_VERSION,
  VMI_SUCCESS: abi.STATUS_SUCCESS,
  VMI_XEN: abi.MODE_XEN,
  VMI_KVM: abi.MODE_KVM,
  VMI_INIT_DOMAINNAME: abi.INIT_BY_NAME,
  VMI_INIT_EVENTS: abi.INIT_WITH_EVENTS,
  VMI_PM_IA32E: abi.PAGE_MODE_IA32E,
  VMI_INIT_DATA_KVMI_SOCKET: abi.INIT_DATA_KVMI_SOCKET,
  VMI_INIT_ERROR_DRIVER: abi.INIT_ERROR_DRIVER,
  VMI_INIT_ERROR_VM_NOT_FOUND: abi.INIT_ERROR_VM_NOT_FOUND,
  VMI_EVENT_MEMORY: abi.EVENT_TYPE_MEMORY,
  VMI_EVENT_SINGLESTEP: abi.EVENT_TYPE_SINGLE_STEP,
  MAX_SINGLESTEP_VCPUS: abi.MAX_STEPPED_VCPUS,
  VMI_MEMACCESS_N: abi.ACCESS_NONE,
  VMI_MEMACCESS_R: abi.ACCESS_READ,
  VMI_MEMACCESS_W: abi.ACCESS_WRITE,
  VMI_MEMACCESS_X: abi.ACCESS_EXECUTE,
  VMI_EVENT_RESPONSE_NONE: abi.RESPONSE_NONE,
  VMI_EVENT_RESPONSE_EMULATE: abi.RESPONSE_EMULATE,
  VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP: abi.RESPONSE_TOGGLE_SINGLE_STEP,
  VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA: abi.RESPONSE_SET_READ_DATA,
  'sizeof(vmi_instance_t)': abi.POINTER_SIZE,
  'sizeof(vmi_init_data_t) + sizeof(vmi_init_data_entry_t)': abi.INIT_DATA.size,
  'offsetof(vmi_init_data_t, count)': abi.INIT_DATA.count,
  'offsetof(vmi_init_data_t, entry) + offsetof(vmi_init_data_entry_t, type)': abi.INIT_DATA.entryType,
  'offsetof(vmi_init_data_t, entry) + offsetof(vmi_init_data_entry_t, data)': abi.INIT_DATA.entryData,
  'sizeof(vmi_event_t)': abi.EVENT.size,
  'offsetof(vmi_event_t, version)': abi.EVENT.version,
  'offsetof(vmi_event_t, type)': abi.EVENT.type,
  'offsetof(vmi_event_t, callback)': abi.EVENT.callback,
  'offsetof(vmi_event_t, vcpu_id)': abi.EVENT.vcpu,
  'offsetof(vmi_event_t, mem_event.gfn)': abi.EVENT.gfn,
  'offsetof(vmi_event_t, mem_event.generic)': abi.EVENT.generic,
  'offsetof(vmi_event_t, mem_event.in_access)': abi.EVENT.inAccess,
  'offsetof(vmi_event_t, mem_event.out_access)': abi.EVENT.outAccess,
  'offsetof(vmi_event_t, mem_event.gla)': abi.EVENT.gla,
  'offsetof(vmi_event_t, mem_event.offset)': abi.EVENT.offset,
  'offsetof(vmi_event_t, ss_event.vcpus)': abi.EVENT.steppedVcpus,
  'offsetof(vmi_event_t, x86_regs)': abi.EVENT.registersOrReadData,
  'offsetof(vmi_event_t, emul_read)': abi.EVENT.registersOrReadData,
  'sizeof(emul_read_t)': abi.READ_DATA.size,
  'offsetof(emul_read_t, size)': abi.READ_DATA.length,
  'offsetof(emul_read_t, dont_free)': abi.READ_DATA.dontFree,
  'offsetof(emul_read_t, data)': abi.READ_DATA.bytes,
  'sizeof(((emul_read_t *)0)->data)': abi.READ_DATA.capacity,
  'sizeof(registers_t)': abi.REGISTERS_SIZE,
  ...Object.fromEntries(
    Object.entries(abi.REGISTER_OFFSETS).map(([name, offset]) => [
      `offsetof(x86_registers_t, ${cRegister(name)})`,
      offset,
    ]),
  ),
};

function cRegister(name: string): string {
  const others: Record<string, string> = {
    efer: 'msr_efer',
    lstar: 'msr_lstar',
    fsBase: 'fs_base',
    gsBase: 'gs_base',
    cs: 'cs_sel',
    ss: 'ss_sel',
    trBase: 'tr_base',
    shadowGs: 'shadow_gs',
    idtrBase: 'idtr_base',
    gdtrBase: 'gdtr_base',
  };
  return others[name] ?? name;
}

test('every layout and constant is the one that a C compiler sees', () => {
  const directory = mkdtempSync(join(tmpdir(), 'memtables-abi-'));
  try {
    const program = join(directory, 'layouts');
    const include = fileURLToPath(new URL('../../native/kvmi/include', import.meta.url));
    const lines = Object.keys(EXPECTED).map((expression) => `printf("%lld\\n", (long long)(${expression}));`);
    const source = `#include <stddef.h>
      #include <stdio.h>
      #include <libvmi/libvmi.h>
      #include <libvmi/events.h>
      int main(void) { ${lines.join('\n')} return 0; }`;
    execFileSync('cc', ['-x', 'c', '-', '-o', program, `-I${include}`], { input: source });
    const values = execFileSync(program, { encoding: 'utf8' }).trim().split('\n').map(Number);
    expect(Object.fromEntries(Object.keys(EXPECTED).map((name, i) => [name, values[i]]))).toEqual(EXPECTED);
  } finally {
    rmSync(directory, { recursive: true });
  }
});

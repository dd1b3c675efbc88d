// Compares the layouts and constants that this project was written with, with what a C compiler makes of headers.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { MemtablesError } from '../errors.js';
import * as abi from './abi.js';

const ASSERTIONS = new URL('../../native/vmi/test/abi_check.c', import.meta.url);

/** libvmi's names, where they are not ours. */
const C_REGISTERS: Readonly<Record<string, string>> = {
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

/** What the binding takes each C expression to be. */
const OF_THE_BINDING: Readonly<Record<string, number>> = {
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
      `offsetof(x86_registers_t, ${C_REGISTERS[name] ?? name})`,
      offset,
    ]),
  ),
};

/** A C expression that is not what it was taken to be; `theirs` is `undefined` where the headers do not know it. */
export interface Difference {
  readonly expression: string;
  readonly ours: number;
  readonly theirs: number | undefined;
}

/**
 * Compares what the binding, and the static assertions of the bundled library's check program, take libvmi's layouts
 * and constants to be with what they are by `<libvmi/libvmi.h>` and `<libvmi/events.h>`.
 *
 * @param flags for the C compiler, such as `-I DIR`
 * @returns how many expressions were compared, and those that differ
 * @throws MemtablesError `SETUP_INCOMPLETE` without a C compiler, or when it cannot use the headers
 */
export function checkAbi(flags: readonly string[]): { compared: number; differences: readonly Difference[] } {
  const both = [...Object.entries(OF_THE_BINDING), ...ofTheCheckProgram()];
  const expected = [
    ...new Map(both.map(([expression, ours]) => [`${expression} ${ours}`, { expression, ours }])).values(),
  ];
  const theirs = valuesOf(
    expected.map(({ expression }) => expression),
    flags,
  );
  const compared = expected.map((entry) => ({ ...entry, theirs: theirs.get(entry.expression) }));
  return { compared: compared.length, differences: compared.filter(({ ours, theirs }) => ours !== theirs) };
}

/** Whether the C compiler finds libvmi's headers. */
export function hasHeaders(flags: readonly string[]): boolean {
  const source = '#if !__has_include(<libvmi/libvmi.h>) || !__has_include(<libvmi/events.h>)\n#error\n#endif';
  return compile(source, [...flags, '-fsyntax-only']).status === 0;
}

/** The static assertions of `abi_check.c`, as C expressions and their values. */
function ofTheCheckProgram(): [expression: string, value: number][] {
  const found: [string, number][] = [];
  const take = (pattern: RegExp, replace: (...groups: string[]) => void) => {
    text = text.replace(pattern, (_match, ...groups) => {
      replace(...groups);
      return '';
    });
  };
  let text = readFileSync(ASSERTIONS, 'utf8').replace(/^#define (?:.*\\\n)*.*$/gm, '');
  take(/\bSIZE\((\w+), (\d+)\);/g, (type, size) => found.push([`sizeof(${type})`, Number(size)]));
  take(/\bFIELD\((\w+), ([\w.]+), (\d+), (\d+)\);/g, (type, field, offset, size) => {
    found.push([`offsetof(${type}, ${field})`, Number(offset)]);
    found.push([`sizeof(((${type} *)0)->${field})`, Number(size)]);
  });
  take(/\b_Static_assert\(([^"]+),\s*"[^"]*"\);/g, (condition = '') => {
    for (const equation of condition.split('&&')) {
      const [expression = '', value] = equation.split('==');
      found.push([expression.trim(), Number(value)]);
    }
  });
  const left = /\b(SIZE|FIELD|_Static_assert)\(.*/.exec(text)?.[0];
  if (left !== undefined || found.some(([, value]) => !Number.isInteger(value))) {
    throw new Error(`an assertion of abi_check.c is not understood: ${left}`);
  }
  return found;
}

/** The value of each expression that the headers know. */
function valuesOf(expressions: readonly string[], flags: readonly string[]): Map<string, number> {
  const directory = mkdtempSync(join(tmpdir(), 'memtables-abi-'));
  try {
    const program = join(directory, 'values');
    let known = [...expressions];
    let { status, stderr } = compile(programFor(known), [...flags, '-o', program]);
    if (status !== 0) {
      const unknown = new Set([...stderr.matchAll(UNKNOWN)].map(([, line]) => known[Number(line)]!));
      known = known.filter((expression) => !unknown.has(expression));
      ({ status, stderr } = compile(programFor(known), [...flags, '-o', program]));
    }
    if (status !== 0) throw compilerFailed(stderr);
    const values = spawnSync(program, { encoding: 'utf8' }).stdout.split('\n');
    return new Map(known.map((expression, i) => [expression, Number(values[i])]));
  } finally {
    rmSync(directory, { recursive: true });
  }
}

/** An expression in a function of its own, as a compiler complains of an unknown name once a function. */
function programFor(expressions: readonly string[]): string {
  const functions = expressions.map(
    (expression, i) =>
      `#line ${i} "expression"\nstatic long long f${i}(void) { return (long long)(${expression}); }`,
  );
  const calls = expressions.map((_, i) => `printf("%lld\\n", f${i}());`);
  return [
    '#include <libvmi/libvmi.h>\n#include <libvmi/events.h>\n#include <stddef.h>\n#include <stdio.h>',
    ...functions,
    `int main(void) { ${calls.join(' ')} return 0; }\n`,
  ].join('\n');
}

const UNKNOWN = /^expression:(\d+):\d+: error:/gm;

function compile(source: string, flags: readonly string[]): { status: number | null; stderr: string } {
  const args = ['-std=gnu11', '-x', 'c', '-', ...flags];
  const { status, stderr, error } = spawnSync('cc', args, { input: source, encoding: 'utf8' });
  // One that ends before it has read all of the source has a status as well.
  if (error && status === null) throw compilerFailed(error.message);
  return { status, stderr };
}

function compilerFailed(message: string): MemtablesError {
  return new MemtablesError(
    'SETUP_INCOMPLETE',
    `the C compiler could not use the headers:\n${message.trim()}`,
    {
      remedy: 'Install a C compiler (cc) and what the headers include, with their files for developers.',
    },
  );
}

// What this binding touches of libvmi's C ABI, as 64-bit Linux lays it out. Nothing else knows an offset.
import type { GprName, Registers } from '../x86/registers.js';

/** `vmi_events_version()` of the one event layout described here. */
export const EVENTS_VERSION = 9;

/** Every function that a session calls: its result and its arguments. `vmi_instance_t` is a `void *`. */
export const SIGNATURES = {
  vmi_events_version: ['uint32_t', []],
  vmi_init: ['uint32_t', ['void *', 'uint32_t', 'str', 'uint64_t', 'void *', 'void *']],
  vmi_init_paging: ['uint32_t', ['void *', 'uint64_t']],
  vmi_destroy: ['uint32_t', ['void *']],
  vmi_get_num_vcpus: ['uint32_t', ['void *']],
  vmi_get_max_physical_address: ['uint64_t', ['void *']],
  vmi_pause_vm: ['uint32_t', ['void *']],
  vmi_resume_vm: ['uint32_t', ['void *']],
  vmi_read_pa: ['uint32_t', ['void *', 'uint64_t', 'size_t', 'void *', 'void *']],
  vmi_write_pa: ['uint32_t', ['void *', 'uint64_t', 'size_t', 'void *', 'void *']],
  vmi_pagetable_lookup: ['uint32_t', ['void *', 'uint64_t', 'uint64_t', 'void *']],
  vmi_pagecache_flush: ['void', ['void *']],
  vmi_v2pcache_flush: ['void', ['void *', 'uint64_t']],
  vmi_get_vcpuregs: ['uint32_t', ['void *', 'void *', 'ulong']],
  vmi_set_vcpuregs: ['uint32_t', ['void *', 'void *', 'ulong']],
  vmi_register_event: ['uint32_t', ['void *', 'void *']],
  vmi_set_mem_event: ['uint32_t', ['void *', 'uint64_t', 'uint8_t', 'uint16_t']],
  vmi_events_listen: ['uint32_t', ['void *', 'uint32_t']],
} as const satisfies Record<string, readonly [result: string, parameters: readonly string[]]>;

export type FunctionName = keyof typeof SIGNATURES;

/** In the order of their numbers in a heartbeat. */
export const FUNCTION_NAMES = Object.keys(SIGNATURES) as readonly FunctionName[];

export const STATUS_SUCCESS = 0;
export const MODE_XEN = 0;
export const MODE_KVM = 1;
export const INIT_BY_NAME = 1;
export const INIT_WITH_EVENTS = 4;
/** 4-level paging, the only mode of the guests we support. */
export const PAGE_MODE_IA32E = 4;
/** Asks `vmi_v2pcache_flush` for every page table. */
export const EVERY_PAGE_TABLE = 0xffff_ffff_ffff_ffffn;

export const POINTER_SIZE = 8;

/** `vmi_init_data_t` with its one entry; the KVM driver looks for the socket in entry 0 only. */
export const INIT_DATA = { size: 24, count: 0, entryType: 8, entryData: 16 } as const;
export const INIT_DATA_KVMI_SOCKET = 2;

/** `vmi_init_error_t`, in the words of a person. */
export const INIT_ERRORS = [
  'no reason given',
  'no hypervisor driver fits',
  'the driver could not connect',
  'there is no virtual machine of this name',
  'the paging mode is unknown',
  'the operating system is unknown',
  'events are not available',
  'no configuration',
  'no configuration entry',
] as const;
export const INIT_ERROR_NONE = 0;
export const INIT_ERROR_DRIVER = 2;
export const INIT_ERROR_VM_NOT_FOUND = 3;

/** `vmi_event_t`, with the parts of its union for a memory and for a single-step event. */
export const EVENT = {
  size: 96,
  version: 0,
  type: 4,
  callback: 24,
  vcpu: 32,
  gfn: 40,
  generic: 48,
  inAccess: 49,
  outAccess: 50,
  gla: 56,
  offset: 64,
  steppedVcpus: 40,
  /** Registers on the way in; the emulated read data on the way out: one pointer for both. */
  registersOrReadData: 88,
} as const;
export const EVENT_TYPE_MEMORY = 1;
export const EVENT_TYPE_SINGLE_STEP = 3;
/** libvmi steps no vCPU beyond these. */
export const MAX_STEPPED_VCPUS = 32;
/** The frame number of an event that is registered for every frame. */
export const EVERY_FRAME = 0xffff_ffff_ffff_ffffn;

/** `vmi_mem_access_t`: the accesses to be told about. */
export const ACCESS_NONE = 1;
export const ACCESS_READ = 2;
export const ACCESS_WRITE = 4;
export const ACCESS_EXECUTE = 8;

/** `event_response_t`. */
export const RESPONSE_NONE = 0;
export const RESPONSE_EMULATE = 2;
export const RESPONSE_SET_READ_DATA = 8;
export const RESPONSE_TOGGLE_SINGLE_STEP = 32;

/** `emul_read_t`. */
export const READ_DATA = { size: 264, length: 0, dontFree: 4, bytes: 8, capacity: 256 } as const;

/** `registers_t`, which on x86-64 is `x86_registers_t`. */
export const REGISTERS_SIZE = 568;
export const REGISTER_OFFSETS: Readonly<Record<keyof Registers, number>> = {
  rax: 0,
  rcx: 8,
  rdx: 16,
  rbx: 24,
  rsp: 32,
  rbp: 40,
  rsi: 48,
  rdi: 56,
  r8: 64,
  r9: 72,
  r10: 80,
  r11: 88,
  r12: 96,
  r13: 104,
  r14: 112,
  r15: 120,
  rflags: 128,
  rip: 152,
  cr0: 160,
  cr2: 168,
  cr3: 176,
  cr4: 184,
  efer: 216,
  lstar: 232,
  fsBase: 256,
  gsBase: 288,
  cs: 336,
  ss: 368,
  trBase: 448,
  shadowGs: 512,
  idtrBase: 520,
  gdtrBase: 536,
};

/** All that a hypervisor lets us set; the rest of a register file is ignored. */
export function isSettable(name: keyof Registers): name is GprName | 'rip' | 'rflags' {
  return REGISTER_OFFSETS[name] <= REGISTER_OFFSETS.rip;
}

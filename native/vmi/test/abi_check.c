/*
 * Drives a library with libvmi's C ABI as any C program would: `abi-check LIBRARY` reads one command a line
 * and prints one line of result for each ("= command status ..."), preceded by a line for every event callback that
 * ran. The layouts below are libvmi's; a header that departs from them does not compile.
 */
#include <dlfcn.h>
#include <libvmi/events.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)
#define FIELD(type, field, offset, size)                            \
  _Static_assert(offsetof(type, field) == (offset) &&               \
                     sizeof(((type *)0)->field) == (size),          \
                 #type "." #field)

SIZE(status_t, 4);
SIZE(vmi_mode_t, 4);
SIZE(vmi_init_error_t, 4);
SIZE(page_mode_t, 4);
SIZE(page_size_t, 4);
SIZE(vmi_event_type_t, 2);
SIZE(vmi_mem_access_t, 1);
SIZE(event_response_t, 4);
SIZE(addr_t, 8);
SIZE(reg_t, 8);

SIZE(vmi_init_data_t, 8);
FIELD(vmi_init_data_t, count, 0, 8);
_Static_assert(offsetof(vmi_init_data_t, entry) == 8, "vmi_init_data_t.entry");
SIZE(vmi_init_data_entry_t, 16);
FIELD(vmi_init_data_entry_t, type, 0, 8);
FIELD(vmi_init_data_entry_t, data, 8, 8);

SIZE(access_context_t, 48);
FIELD(access_context_t, version, 0, 4);
FIELD(access_context_t, pm, 8, 4);
FIELD(access_context_t, npm, 12, 4);
FIELD(access_context_t, npt, 16, 8);
FIELD(access_context_t, tm, 24, 4);
FIELD(access_context_t, addr, 32, 8);
FIELD(access_context_t, pt, 40, 8);
FIELD(access_context_t, dtb, 40, 8);
FIELD(access_context_t, pid, 40, 4);

SIZE(page_info_t, 136);
FIELD(page_info_t, vaddr, 0, 8);
FIELD(page_info_t, paddr, 8, 8);
FIELD(page_info_t, naddr, 16, 8);
FIELD(page_info_t, size, 24, 4);
FIELD(page_info_t, nsize, 28, 4);
FIELD(page_info_t, pt, 32, 8);
FIELD(page_info_t, pm, 40, 4);
FIELD(page_info_t, npt, 48, 8);
FIELD(page_info_t, npm, 56, 4);
FIELD(page_info_t, x86_ia32e.pte_location, 72, 8);
FIELD(page_info_t, x86_ia32e.pte_value, 80, 8);
FIELD(page_info_t, x86_ia32e.pgd_location, 88, 8);
FIELD(page_info_t, x86_ia32e.pgd_value, 96, 8);
FIELD(page_info_t, x86_ia32e.pdpte_location, 104, 8);
FIELD(page_info_t, x86_ia32e.pdpte_value, 112, 8);
FIELD(page_info_t, x86_ia32e.pml4e_location, 120, 8);
FIELD(page_info_t, x86_ia32e.pml4e_value, 128, 8);

SIZE(registers_t, 568);
SIZE(x86_registers_t, 568);
FIELD(x86_registers_t, rax, 0, 8);
FIELD(x86_registers_t, rcx, 8, 8);
FIELD(x86_registers_t, rdx, 16, 8);
FIELD(x86_registers_t, rbx, 24, 8);
FIELD(x86_registers_t, rsp, 32, 8);
FIELD(x86_registers_t, rbp, 40, 8);
FIELD(x86_registers_t, rsi, 48, 8);
FIELD(x86_registers_t, rdi, 56, 8);
FIELD(x86_registers_t, r8, 64, 8);
FIELD(x86_registers_t, r9, 72, 8);
FIELD(x86_registers_t, r10, 80, 8);
FIELD(x86_registers_t, r11, 88, 8);
FIELD(x86_registers_t, r12, 96, 8);
FIELD(x86_registers_t, r13, 104, 8);
FIELD(x86_registers_t, r14, 112, 8);
FIELD(x86_registers_t, r15, 120, 8);
FIELD(x86_registers_t, rflags, 128, 8);
FIELD(x86_registers_t, dr6, 136, 8);
FIELD(x86_registers_t, dr7, 144, 8);
FIELD(x86_registers_t, rip, 152, 8);
FIELD(x86_registers_t, cr0, 160, 8);
FIELD(x86_registers_t, cr2, 168, 8);
FIELD(x86_registers_t, cr3, 176, 8);
FIELD(x86_registers_t, cr4, 184, 8);
FIELD(x86_registers_t, sysenter_cs, 192, 8);
FIELD(x86_registers_t, sysenter_esp, 200, 8);
FIELD(x86_registers_t, sysenter_eip, 208, 8);
FIELD(x86_registers_t, msr_efer, 216, 8);
FIELD(x86_registers_t, msr_star, 224, 8);
FIELD(x86_registers_t, msr_lstar, 232, 8);
FIELD(x86_registers_t, msr_pat, 240, 8);
FIELD(x86_registers_t, msr_cstar, 248, 8);
FIELD(x86_registers_t, fs_base, 256, 8);
FIELD(x86_registers_t, fs_limit, 264, 8);
FIELD(x86_registers_t, fs_sel, 272, 8);
FIELD(x86_registers_t, fs_arbytes, 280, 8);
FIELD(x86_registers_t, gs_base, 288, 8);
FIELD(x86_registers_t, gs_arbytes, 312, 8);
FIELD(x86_registers_t, cs_base, 320, 8);
FIELD(x86_registers_t, cs_limit, 328, 8);
FIELD(x86_registers_t, cs_sel, 336, 8);
FIELD(x86_registers_t, cs_arbytes, 344, 8);
FIELD(x86_registers_t, ss_base, 352, 8);
FIELD(x86_registers_t, ss_arbytes, 376, 8);
FIELD(x86_registers_t, ds_base, 384, 8);
FIELD(x86_registers_t, es_base, 416, 8);
FIELD(x86_registers_t, tr_base, 448, 8);
FIELD(x86_registers_t, tr_sel, 464, 8);
FIELD(x86_registers_t, ldt_base, 480, 8);
FIELD(x86_registers_t, shadow_gs, 512, 8);
FIELD(x86_registers_t, idtr_base, 520, 8);
FIELD(x86_registers_t, idtr_limit, 528, 8);
FIELD(x86_registers_t, gdtr_base, 536, 8);
FIELD(x86_registers_t, gdtr_limit, 544, 8);
FIELD(x86_registers_t, npt_base, 552, 8);
FIELD(x86_registers_t, vmtrace_pos, 560, 8);

SIZE(vmi_event_t, 96);
FIELD(vmi_event_t, version, 0, 4);
FIELD(vmi_event_t, type, 4, 2);
FIELD(vmi_event_t, slat_id, 6, 2);
FIELD(vmi_event_t, next_slat_id, 8, 2);
FIELD(vmi_event_t, _reserved, 10, 6);
FIELD(vmi_event_t, data, 16, 8);
FIELD(vmi_event_t, callback, 24, 8);
FIELD(vmi_event_t, vcpu_id, 32, 4);
FIELD(vmi_event_t, page_mode, 36, 4);
FIELD(vmi_event_t, mem_event, 40, 32);
FIELD(vmi_event_t, ss_event, 40, 32);
FIELD(vmi_event_t, x86_regs, 88, 8);
FIELD(vmi_event_t, emul_read, 88, 8);
FIELD(vmi_event_t, mem_event.gfn, 40, 8);
FIELD(vmi_event_t, mem_event.generic, 48, 1);
FIELD(vmi_event_t, mem_event.in_access, 49, 1);
FIELD(vmi_event_t, mem_event.out_access, 50, 1);
FIELD(vmi_event_t, mem_event.gptw, 51, 1);
FIELD(vmi_event_t, mem_event.gla_valid, 52, 1);
FIELD(vmi_event_t, mem_event.gla, 56, 8);
FIELD(vmi_event_t, mem_event.offset, 64, 8);
FIELD(vmi_event_t, ss_event.vcpus, 40, 4);
FIELD(vmi_event_t, ss_event.enable, 44, 1);
FIELD(vmi_event_t, ss_event.gla, 48, 8);
FIELD(vmi_event_t, ss_event.gfn, 56, 8);
FIELD(vmi_event_t, ss_event.offset, 64, 8);

SIZE(emul_read_t, 264);
FIELD(emul_read_t, size, 0, 4);
FIELD(emul_read_t, dont_free, 4, 1);
FIELD(emul_read_t, data, 8, 256);

_Static_assert(VMI_EVENTS_VERSION == 9 && ACCESS_CONTEXT_VERSION == 1, "versions");
_Static_assert(VMI_INIT_DOMAINNAME == 1 && VMI_INIT_DOMAINID == 2 && VMI_INIT_EVENTS == 4 && VMI_INIT_DOMAINUUID == 8,
               "init flags");
_Static_assert(VMI_KVM == 1 && VMI_INIT_DATA_KVMI_SOCKET == 2 && VMI_FAILURE == 1, "enumerations");
_Static_assert(VMI_PM_IA32E == 4 && VMI_TM_NONE == 0 && VMI_TM_PROCESS_DTB == 1, "paging");
_Static_assert(VMI_EVENT_MEMORY == 1 && VMI_EVENT_SINGLESTEP == 3, "event types");
_Static_assert(VMI_MEMACCESS_N == 1 && VMI_MEMACCESS_R == 2 && VMI_MEMACCESS_W == 4 && VMI_MEMACCESS_X == 8, "access");
_Static_assert(VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA == 8 && VMI_EVENT_RESPONSE_DENY == 16 &&
                   VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP == 32 && VMI_EVENT_RESPONSE_SET_REGISTERS == 128,
               "responses");
_Static_assert(RAX == 0 && RIP == 8 && RFLAGS == 9 && R15 == 17 && CR3 == 20 && FS_BASE == 50 && IDTR_BASE == 55 &&
                   MSR_LSTAR == 71 && MSR_EFER == 74 && MSR_STAR == 119,
               "registers");

#define FUNCTIONS(F)                                                                                              \
  F(vmi_init) F(vmi_destroy) F(vmi_get_num_vcpus) F(vmi_get_memsize) F(vmi_get_max_physical_address)              \
  F(vmi_pause_vm) F(vmi_resume_vm) F(vmi_init_paging) F(vmi_pagetable_lookup) F(vmi_pagetable_lookup_extended)    \
  F(vmi_read) F(vmi_write) F(vmi_read_pa) F(vmi_write_pa) F(vmi_pagecache_flush) F(vmi_v2pcache_flush)            \
  F(vmi_get_vcpuregs) F(vmi_set_vcpuregs) F(vmi_get_vcpureg) F(vmi_set_vcpureg) F(vmi_events_version)             \
  F(vmi_register_event) F(vmi_clear_event) F(vmi_set_mem_event) F(vmi_step_event) F(vmi_toggle_single_step_vcpu)  \
  F(vmi_events_listen) F(vmi_are_events_pending)

static struct {
#define MEMBER(name) __typeof__(&name) name;
  FUNCTIONS(MEMBER)
} lib;

enum { SLOTS = 8, MAX_LINE = 64 * 1024, MAX_DATA = 16 * 1024 };

static vmi_instance_t vmi;
static vmi_event_t events[SLOTS];
static char actions[MAX_LINE]; /* what the next callbacks do */
static uint8_t data[MAX_DATA];

static time_t now = 1000000;

/* Takes the place of the C library's: pages that a library keeps grow old when a test says so. */
__attribute__((visibility("default"))) time_t time(time_t *copy) {
  if (copy) *copy = now;
  return now;
}

static void die(const char *what, const char *detail) {
  fprintf(stderr, "abi-check: %s: %s\n", what, detail);
  exit(2);
}

static void say(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  putchar('\n');
  fflush(stdout);
}

/* The next word of the line being read; "" at its end. */
static char *word(char **rest) {
  char *found = strtok_r(NULL, " \n", rest);
  return found ? found : (char *)"";
}

static uint64_t number(char **rest) { return strtoull(word(rest), NULL, 0); }

static size_t bytes(char **rest) {
  const char *hex = word(rest);
  size_t size = 0;
  for (unsigned byte; size < MAX_DATA && sscanf(hex, "%2x", &byte) == 1; hex += 2) data[size++] = (uint8_t)byte;
  return size;
}

static void printHex(const uint8_t *from, size_t size) {
  for (size_t i = 0; i < size; i++) printf("%02x", from[i]);
}

static void freed(vmi_event_t *event, status_t status) { say("freed slot=%td status=%d", event - events, status); }

static emul_read_t *emulate(char **rest, uint8_t dontFree) {
  static emul_read_t kept;
  emul_read_t *read = dontFree ? &kept : malloc(sizeof *read);
  if (!read) die("emulate", "out of memory");
  memset(read, 0, sizeof *read);
  read->size = (uint32_t)bytes(rest);
  read->dont_free = dontFree;
  memcpy(read->data, data, read->size);
  return read;
}

static event_response_t onEvent(vmi_instance_t instance, vmi_event_t *event) {
  const x86_registers_t *regs = event->x86_regs;
  if (event->type == VMI_EVENT_MEMORY) {
    say("event memory slot=%td vcpu=%u view=%u gfn=0x%llx access=%u gla=0x%llx offset=0x%llx rip=0x%llx rcx=0x%llx "
        "cr3=0x%llx cs=0x%llx efer=0x%llx gla_valid=%u",
        event - events, event->vcpu_id, event->slat_id, (unsigned long long)event->mem_event.gfn,
        event->mem_event.out_access, (unsigned long long)event->mem_event.gla,
        (unsigned long long)event->mem_event.offset, (unsigned long long)regs->rip, (unsigned long long)regs->rcx,
        (unsigned long long)regs->cr3, (unsigned long long)regs->cs_arbytes, (unsigned long long)regs->msr_efer,
        event->mem_event.gla_valid);
  } else {
    say("event step slot=%td vcpu=%u gla=0x%llx offset=0x%llx", event - events, event->vcpu_id,
        (unsigned long long)event->ss_event.gla, (unsigned long long)event->ss_event.offset);
  }

  event_response_t response = VMI_EVENT_RESPONSE_NONE;
  char line[MAX_LINE], *rest = NULL;
  strcpy(line, actions);
  for (char *action = strtok_r(line, " \n", &rest); action; action = strtok_r(NULL, " \n", &rest)) {
    if (!strcmp(action, "emulate")) {
      event->emul_read = emulate(&rest, 1);
      response |= VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA;
    } else if (!strcmp(action, "emulate-allocated")) {
      event->emul_read = emulate(&rest, 0);
      response |= VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA;
    } else if (!strcmp(action, "emulate-size")) {
      event->emul_read = emulate(&(char *){""}, 1);
      event->emul_read->size = (uint32_t)number(&rest);
      response |= VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA;
    } else if (!strcmp(action, "respond")) {
      response |= (event_response_t)number(&rest);
    } else if (!strcmp(action, "set-rcx")) {
      event->x86_regs->rcx = number(&rest);
    } else if (!strcmp(action, "pause")) {
      say("in pause %d", lib.vmi_pause_vm(instance));
    } else if (!strcmp(action, "resume")) {
      say("in resume %d", lib.vmi_resume_vm(instance));
    } else if (!strcmp(action, "listen")) {
      say("in listen %d", lib.vmi_events_listen(instance, 0));
    } else if (!strcmp(action, "destroy")) {
      say("in destroy %d", lib.vmi_destroy(instance));
    } else if (!strcmp(action, "clear")) {
      say("in clear %d", lib.vmi_clear_event(instance, &events[number(&rest) % SLOTS], freed));
    } else if (!strcmp(action, "step")) {
      say("in step %d", lib.vmi_step_event(instance, event, event->vcpu_id, number(&rest), NULL));
    } else if (!strcmp(action, "read")) {
      const addr_t pa = number(&rest);
      say("in read %d", lib.vmi_read_pa(instance, pa, 8, data, NULL));
    } else {
      die("unknown action", action);
    }
  }
  return response;
}

static event_response_t onStepsDone(vmi_instance_t instance, vmi_event_t *event) {
  (void)instance;
  say("event steps-done slot=%td", event - events);
  return VMI_EVENT_RESPONSE_NONE;
}

static vmi_event_t *newEvent(char **rest, vmi_event_type_t type) {
  vmi_event_t *event = &events[number(rest) % SLOTS];
  memset(event, 0, sizeof *event);
  event->version = VMI_EVENTS_VERSION;
  event->type = type;
  event->callback = onEvent;
  return event;
}

static access_context_t virtually(char **rest) {
  access_context_t context = {.version = ACCESS_CONTEXT_VERSION, .tm = VMI_TM_PROCESS_DTB};
  context.pt = number(rest);
  context.addr = number(rest);
  return context;
}

static void run(const char *command, char **rest) {
  if (!strcmp(command, "init")) {
    vmi_init_data_t *init = calloc(1, sizeof *init + sizeof *init->entry);
    init->count = 1;
    init->entry[0].type = VMI_INIT_DATA_KVMI_SOCKET;
    init->entry[0].data = word(rest);
    const uint64_t flags = number(rest);
    const vmi_mode_t mode = (vmi_mode_t)number(rest);
    const char *name = word(rest);
    vmi_init_error_t error = VMI_INIT_ERROR_NONE;
    const status_t status = lib.vmi_init(&vmi, mode, *name ? name : "guest", flags, init, &error);
    free(init);
    say("= init %d error=%d", status, error);
  } else if (!strcmp(command, "version")) {
    say("= version %u", lib.vmi_events_version());
  } else if (!strcmp(command, "destroy")) {
    say("= destroy %d", lib.vmi_destroy(vmi));
    vmi = NULL;
  } else if (!strcmp(command, "size")) {
    const unsigned vcpus = lib.vmi_get_num_vcpus(vmi);
    const uint64_t size = lib.vmi_get_memsize(vmi);
    say("= size %u 0x%llx 0x%llx", vcpus, (unsigned long long)size,
        (unsigned long long)lib.vmi_get_max_physical_address(vmi));
  } else if (!strcmp(command, "paging")) {
    say("= paging %u", lib.vmi_init_paging(vmi, number(rest)));
  } else if (!strcmp(command, "translate")) {
    page_info_t info;
    const addr_t pt = number(rest), va = number(rest);
    addr_t pa = 0;
    const status_t status = lib.vmi_pagetable_lookup(vmi, pt, va, &pa);
    const status_t extended = lib.vmi_pagetable_lookup_extended(vmi, pt, va, &info);
    say("= translate %d %d 0x%llx 0x%x", status, extended, (unsigned long long)pa, extended ? 0 : info.size);
  } else if (!strcmp(command, "read") || !strcmp(command, "read-virtual")) {
    const bool isVirtual = !strcmp(command, "read-virtual");
    const access_context_t context =
        isVirtual ? virtually(rest)
                  : (access_context_t){.version = ACCESS_CONTEXT_VERSION, .addr = number(rest)};
    const size_t count = number(rest) % (MAX_DATA + 1);
    size_t done = ~(size_t)0;
    const status_t status = isVirtual ? lib.vmi_read(vmi, &context, count, data, &done)
                                      : lib.vmi_read_pa(vmi, context.addr, count, data, &done);
    printf("= %s %d %zu ", command, status, done);
    printHex(data, done <= count ? done : 0);
    say("");
  } else if (!strcmp(command, "write") || !strcmp(command, "write-virtual")) {
    const bool isVirtual = !strcmp(command, "write-virtual");
    const access_context_t context =
        isVirtual ? virtually(rest)
                  : (access_context_t){.version = ACCESS_CONTEXT_VERSION, .addr = number(rest)};
    const size_t count = bytes(rest);
    size_t done = ~(size_t)0;
    const status_t status = isVirtual ? lib.vmi_write(vmi, &context, count, data, &done)
                                      : lib.vmi_write_pa(vmi, context.addr, count, data, &done);
    say("= %s %d %zu", command, status, done);
  } else if (!strcmp(command, "flush")) {
    lib.vmi_pagecache_flush(vmi);
    lib.vmi_v2pcache_flush(vmi, ~(addr_t)0);
    say("= flush 0");
  } else if (!strcmp(command, "flush-pages")) {
    lib.vmi_pagecache_flush(vmi);
    say("= flush-pages 0");
  } else if (!strcmp(command, "flush-translations")) {
    const char *root = word(rest);
    lib.vmi_v2pcache_flush(vmi, *root ? strtoull(root, NULL, 0) : ~(addr_t)0);
    say("= flush-translations 0");
  } else if (!strcmp(command, "pass-seconds")) {
    now += (time_t)number(rest);
    say("= pass-seconds 0");
  } else if (!strcmp(command, "registers")) {
    registers_t registers = {0};
    const status_t status = lib.vmi_get_vcpuregs(vmi, &registers, number(rest));
    printf("= registers %d ", status);
    printHex((const uint8_t *)&registers, sizeof registers);
    say("");
  } else if (!strcmp(command, "set-registers")) {
    /* every field gets a value of its own */
    registers_t registers;
    const unsigned long vcpu = number(rest);
    uint64_t *fields = (uint64_t *)&registers;
    for (size_t i = 0; i < sizeof registers / sizeof *fields; i++) fields[i] = 0x1000 + i;
    say("= set-registers %d", lib.vmi_set_vcpuregs(vmi, &registers, vcpu));
  } else if (!strcmp(command, "register")) {
    uint64_t value = 0;
    const unsigned long vcpu = number(rest);
    const status_t status = lib.vmi_get_vcpureg(vmi, &value, number(rest), vcpu);
    say("= register %d 0x%llx", status, (unsigned long long)value);
  } else if (!strcmp(command, "set-register")) {
    const unsigned long vcpu = number(rest);
    const reg_t reg = number(rest);
    say("= set-register %d", lib.vmi_set_vcpureg(vmi, number(rest), reg, vcpu));
  } else if (!strcmp(command, "watch")) {
    vmi_event_t *event = newEvent(rest, VMI_EVENT_MEMORY);
    event->mem_event.gfn = number(rest);
    event->mem_event.in_access = (vmi_mem_access_t)number(rest);
    say("= watch %d", lib.vmi_register_event(vmi, event));
  } else if (!strcmp(command, "watch-all")) {
    vmi_event_t *event = newEvent(rest, VMI_EVENT_MEMORY);
    event->mem_event.gfn = ~(addr_t)0;
    event->mem_event.generic = 1;
    event->mem_event.in_access = (vmi_mem_access_t)number(rest);
    say("= watch-all %d", lib.vmi_register_event(vmi, event));
  } else if (!strcmp(command, "watch-steps")) {
    vmi_event_t *event = newEvent(rest, VMI_EVENT_SINGLESTEP);
    event->ss_event.vcpus = (uint32_t)number(rest);
    event->ss_event.enable = 1;
    say("= watch-steps %d", lib.vmi_register_event(vmi, event));
  } else if (!strcmp(command, "watch-type")) {
    vmi_event_t *event = newEvent(rest, 0);
    event->type = (vmi_event_type_t)number(rest);
    event->version = (uint32_t)number(rest);
    say("= watch-type %d", lib.vmi_register_event(vmi, event));
  } else if (!strcmp(command, "clear")) {
    say("= clear %d", lib.vmi_clear_event(vmi, &events[number(rest) % SLOTS], freed));
  } else if (!strcmp(command, "trap")) {
    const addr_t gfn = number(rest);
    say("= trap %d", lib.vmi_set_mem_event(vmi, gfn, (vmi_mem_access_t)number(rest), 0));
  } else if (!strcmp(command, "step")) {
    vmi_event_t *event = &events[number(rest) % SLOTS];
    const uint32_t vcpu = (uint32_t)number(rest);
    say("= step %d", lib.vmi_step_event(vmi, event, vcpu, number(rest), onStepsDone));
  } else if (!strcmp(command, "toggle")) {
    vmi_event_t *event = &events[number(rest) % SLOTS];
    const uint32_t vcpu = (uint32_t)number(rest);
    say("= toggle %d", lib.vmi_toggle_single_step_vcpu(vmi, event, vcpu, number(rest) != 0));
  } else if (!strcmp(command, "actions")) {
    const char *rest_of_line = *rest ? *rest : "";
    strcpy(actions, rest_of_line);
    say("= actions 0");
  } else if (!strcmp(command, "pause")) {
    say("= pause %d", lib.vmi_pause_vm(vmi));
  } else if (!strcmp(command, "resume")) {
    say("= resume %d", lib.vmi_resume_vm(vmi));
  } else if (!strcmp(command, "listen")) {
    say("= listen %d", lib.vmi_events_listen(vmi, (uint32_t)number(rest)));
  } else if (!strcmp(command, "pending")) {
    say("= pending %d", lib.vmi_are_events_pending(vmi));
  } else {
    die("unknown command", command);
  }
}

int main(int argc, char **argv) {
  if (argc != 2) die("usage", "abi-check LIBRARY");
  void *handle = dlopen(argv[1], RTLD_NOW);
  if (!handle) die("cannot load", dlerror());
#define LOAD(name) \
  if (!(lib.name = (__typeof__(lib.name))dlsym(handle, #name))) die("not exported", #name);
  FUNCTIONS(LOAD)

  static char line[MAX_LINE];
  while (fgets(line, sizeof line, stdin)) {
    char *rest = NULL;
    char *command = strtok_r(line, " \n", &rest);
    if (command) run(command, &rest);
  }
  return 0;
}

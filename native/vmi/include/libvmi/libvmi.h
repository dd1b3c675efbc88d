/*
 * libvmi's C interface, as far as memtables uses it: instances, physical and virtual memory, registers, pause. Names and
 * layouts are those of libvmi 0.15, so a program compiled against either header runs on either library. Memory events
 * are in events.h.
 *
 * Every function returns VMI_SUCCESS or VMI_FAILURE unless it says otherwise; the reason of a failure goes to
 * stderr. An instance belongs to one thread. No call waits longer than about ten seconds for the hypervisor, except
 * vmi_events_listen, which waits as long as it is told. After the hypervisor has gone away, broken the protocol or
 * left a command unanswered, every call that needs it fails; only vmi_destroy is left.
 *
 * There are two libraries with it, one for KVM (over a KVMI socket) and one for Xen. These headers describe the one for
 * KVM: docs/xen-library.md says what is different on Xen, docs/kvmi-library.md where the one for KVM differs from libvmi.
 */
#ifndef LIBVMI_H
#define LIBVMI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VMI_API __attribute__((visibility("default")))

typedef enum status { VMI_SUCCESS = 0, VMI_FAILURE = 1 } status_t;

/* ---- attaching ---- */

/* How `domain` names the guest: exactly one of the first, second and fourth. */
#define VMI_INIT_DOMAINNAME (1u << 0)
#define VMI_INIT_DOMAINID (1u << 1)
/* Prepares the vCPUs for events; without it the functions of events.h fail. */
#define VMI_INIT_EVENTS (1u << 2)
#define VMI_INIT_DOMAINUUID (1u << 3)

/* Each library serves its own mode only. */
typedef enum vmi_mode { VMI_XEN = 0, VMI_KVM = 1, VMI_FILE = 2, VMI_BAREFLANK = 3 } vmi_mode_t;

/* The stage at which vmi_init failed. */
typedef enum vmi_init_error {
  VMI_INIT_ERROR_NONE = 0,
  VMI_INIT_ERROR_DRIVER_NOT_DETECTED = 1,
  VMI_INIT_ERROR_DRIVER = 2,
  VMI_INIT_ERROR_VM_NOT_FOUND = 3,
  VMI_INIT_ERROR_PAGING = 4,
  VMI_INIT_ERROR_OS = 5,
  VMI_INIT_ERROR_EVENTS = 6,
  VMI_INIT_ERROR_NO_CONFIG = 7,
  VMI_INIT_ERROR_NO_CONFIG_ENTRY = 8
} vmi_init_error_t;

typedef enum {
  VMI_INIT_DATA_XEN_EVTCHN = 0,
  VMI_INIT_DATA_MEMMAP = 1,
  /* `data` is the path of the unix socket on which the hypervisor will connect. */
  VMI_INIT_DATA_KVMI_SOCKET = 2
} vmi_init_data_type_t;

typedef struct {
  uint64_t type; /* a vmi_init_data_type_t */
  void *data;
} vmi_init_data_entry_t;

typedef struct {
  uint64_t count;
  vmi_init_data_entry_t entry[];
} vmi_init_data_t;

typedef struct vmi_instance *vmi_instance_t;

/*
 * Attaches to a guest. `*vmi` is the instance, or NULL on failure; `error`, if not NULL, then says why. `mode` has to be
 * the library's own.
 *
 * On KVM it creates the socket named by entry 0 of `init_data` and waits up to ten seconds for the hypervisor to connect.
 * Fails without waiting when the path is too long, starts with a number other than zero (libvmi takes that for a vsock
 * port), is a file that is no socket, or belongs to a program that is waiting there already. On Xen `init_data` is not
 * looked at; with VMI_INIT_DOMAINID `domain` points to a uint64_t.
 */
VMI_API status_t vmi_init(vmi_instance_t *vmi, vmi_mode_t mode, const void *domain, uint64_t init_flags,
                          vmi_init_data_t *init_data, vmi_init_error_t *error);

/*
 * Turns events off, answers what is unanswered, resumes the guest if it is paused, and disconnects. Page permissions
 * are not given back: clear the events first. Fails only on NULL and inside a callback.
 */
VMI_API status_t vmi_destroy(vmi_instance_t vmi);

/* ---- the guest ---- */

typedef uint64_t addr_t;
typedef uint64_t reg_t;

/* As of the attach; 0 on NULL. */
VMI_API unsigned int vmi_get_num_vcpus(vmi_instance_t vmi);
/* Bytes of guest-physical memory; asks the hypervisor, 0 on failure. */
VMI_API uint64_t vmi_get_memsize(vmi_instance_t vmi);
/* The exclusive upper end of guest-physical memory; asks the hypervisor, 0 on failure. */
VMI_API addr_t vmi_get_max_physical_address(vmi_instance_t vmi);

/*
 * Pauses every vCPU; nests. Not a barrier: a vCPU in the middle of an emulated instruction completes it, and may
 * raise its event, before it stops.
 */
VMI_API status_t vmi_pause_vm(vmi_instance_t vmi);
/*
 * Undoes one vmi_pause_vm; the last one lets the vCPUs run. Waits for vCPUs that have not stopped yet, and event
 * callbacks run meanwhile. Fails, and leaves the guest paused, when they do not all stop within ten seconds and,
 * inside a callback, when it would have to wait. It can be called again then.
 */
VMI_API status_t vmi_resume_vm(vmi_instance_t vmi);

/* ---- paging ---- */

typedef uint32_t page_mode_t;
#define VMI_PM_NONE 0
#define VMI_PM_UNKNOWN 1
#define VMI_PM_LEGACY 2
#define VMI_PM_PAE 3
#define VMI_PM_IA32E 4

/* Take page-table entries that Windows marks as "in transition" for present ones. */
#define VMI_PM_INITFLAG_TRANSITION_PAGES (1u << 0)

typedef uint32_t page_size_t;
#define VMI_PS_4KB 0x1000u
#define VMI_PS_2MB 0x200000u
#define VMI_PS_1GB 0x40000000u

/* What a page walk met. Fields of levels below a large page are zero, and so are the nested ones. */
typedef struct page_info {
  addr_t vaddr;
  addr_t paddr;
  addr_t naddr;
  page_size_t size;
  page_size_t nsize;
  addr_t pt;
  page_mode_t pm;
  addr_t npt;
  page_mode_t npm;
  struct {
    addr_t pte_value_prev;
    addr_t pte_location;
    addr_t pte_value;
    addr_t pgd_location;
    addr_t pgd_value;
    addr_t pdpte_location;
    addr_t pdpte_value;
    addr_t pml4e_location;
    addr_t pml4e_value;
  } x86_ia32e;
} page_info_t;

/*
 * Finds out, from the registers of vCPU 0, how the guest pages, and returns it. Virtual addresses can be used only
 * after this has returned VMI_PM_IA32E (four levels); VMI_PM_UNKNOWN is a failure.
 */
VMI_API page_mode_t vmi_init_paging(vmi_instance_t vmi, uint64_t flags);

/* Translates `vaddr` through the page table whose root is `pt` (a CR3 value will do). */
VMI_API status_t vmi_pagetable_lookup(vmi_instance_t vmi, addr_t pt, addr_t vaddr, addr_t *paddr);
VMI_API status_t vmi_pagetable_lookup_extended(vmi_instance_t vmi, addr_t pt, addr_t vaddr, page_info_t *info);

/* ---- memory ---- */

typedef uint32_t translation_mechanism_t;
#define VMI_TM_NONE 0        /* the address is physical */
#define VMI_TM_PROCESS_DTB 1 /* translate with the page table `pt` */
#define VMI_TM_PROCESS_PT 1
#define VMI_TM_PROCESS_PID 2   /* needs knowledge of the guest's system: always fails here */
#define VMI_TM_KERNEL_SYMBOL 3 /* the same */

#define ACCESS_CONTEXT_VERSION 1u

typedef struct {
  uint32_t version; /* ACCESS_CONTEXT_VERSION */
  uint32_t _pad;
  page_mode_t pm;  /* 0: the one found by vmi_init_paging */
  page_mode_t npm; /* nested paging: has to be 0 */
  addr_t npt;      /* the same */
  translation_mechanism_t tm;
  uint32_t _pad2;
  addr_t addr;
  union {
    addr_t pt;
    addr_t dtb;
    int32_t pid;
  };
} access_context_t;

/*
 * Read and write `count` bytes, also across pages. `*done`, if not NULL, is set to the bytes that were transferred,
 * on failure too. A page that was read lately is not read again, also while the guest runs, nor is one that could not
 * be read: pages are kept until they are flushed or, by a clock of whole seconds, more than one old.
 */
VMI_API status_t vmi_read(vmi_instance_t vmi, const access_context_t *ctx, size_t count, void *buf, size_t *done);
VMI_API status_t vmi_write(vmi_instance_t vmi, const access_context_t *ctx, size_t count, void *buf, size_t *done);
VMI_API status_t vmi_read_pa(vmi_instance_t vmi, addr_t paddr, size_t count, void *buf, size_t *done);
VMI_API status_t vmi_write_pa(vmi_instance_t vmi, addr_t paddr, size_t count, void *buf, size_t *done);

/* Forgets cached pages: what is read next is what memory holds now. */
VMI_API void vmi_pagecache_flush(vmi_instance_t vmi);
/* Forgets cached translations, which do not age, of the page table `pt`, ~0 for all. */
VMI_API void vmi_v2pcache_flush(vmi_instance_t vmi, addr_t pt);

/* ---- registers ---- */

/* Register numbers for vmi_get_vcpureg and vmi_set_vcpureg. */
#define RAX 0
#define RBX 1
#define RCX 2
#define RDX 3
#define RBP 4
#define RSI 5
#define RDI 6
#define RSP 7
#define RIP 8
#define RFLAGS 9
#define R8 10
#define R9 11
#define R10 12
#define R11 13
#define R12 14
#define R13 15
#define R14 16
#define R15 17
#define CR0 18
#define CR2 19
#define CR3 20
#define CR4 21
#define IDTR_LIMIT 45
#define GDTR_LIMIT 46
#define FS_BASE 50
#define GS_BASE 51
#define IDTR_BASE 55
#define GDTR_BASE 56
#define SYSENTER_CS 65
#define SYSENTER_ESP 66
#define SYSENTER_EIP 67
#define MSR_LSTAR 71
#define MSR_CSTAR 72
#define MSR_EFER 74
#define MSR_STAR 119

/*
 * Segment attributes (`*_arbytes`): type in bits 0-3, s 4, dpl 5-6, p 7, avl 8, l 9, db 10, g 11.
 * KVMI does not tell dr6, dr7, msr_pat, shadow_gs, npt_base and vmtrace_pos: they are zero.
 */
typedef struct x86_regs {
  uint64_t rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi;
  uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
  uint64_t rflags, dr6, dr7, rip;
  uint64_t cr0, cr2, cr3, cr4;
  uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
  uint64_t msr_efer, msr_star, msr_lstar, msr_pat, msr_cstar;
  uint64_t fs_base, fs_limit, fs_sel, fs_arbytes;
  uint64_t gs_base, gs_limit, gs_sel, gs_arbytes;
  uint64_t cs_base, cs_limit, cs_sel, cs_arbytes;
  uint64_t ss_base, ss_limit, ss_sel, ss_arbytes;
  uint64_t ds_base, ds_limit, ds_sel, ds_arbytes;
  uint64_t es_base, es_limit, es_sel, es_arbytes;
  uint64_t tr_base, tr_limit, tr_sel, tr_arbytes;
  uint64_t ldt_base, ldt_limit, ldt_sel, ldt_arbytes;
  uint64_t shadow_gs;
  uint64_t idtr_base, idtr_limit, gdtr_base, gdtr_limit;
  uint64_t npt_base, vmtrace_pos;
} x86_registers_t;

typedef struct registers {
  x86_registers_t x86;
} registers_t;

VMI_API status_t vmi_get_vcpuregs(vmi_instance_t vmi, registers_t *regs, unsigned long vcpu);
/* Sets the general-purpose registers, RIP and RFLAGS; the rest of `regs` is not looked at. */
VMI_API status_t vmi_set_vcpuregs(vmi_instance_t vmi, registers_t *regs, unsigned long vcpu);
/* Any register numbered above. */
VMI_API status_t vmi_get_vcpureg(vmi_instance_t vmi, uint64_t *value, reg_t reg, unsigned long vcpu);
/* RAX to R15, RIP and RFLAGS. */
VMI_API status_t vmi_set_vcpureg(vmi_instance_t vmi, uint64_t value, reg_t reg, unsigned long vcpu);

#ifdef __cplusplus
}
#endif

#endif

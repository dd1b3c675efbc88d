/*
 * Memory and single-step events, with libvmi's names and layouts (see libvmi.h). Other kinds of events have their
 * number here but cannot be registered.
 *
 * A vCPU that raises an event stands still until its callback has returned; it then completes the instruction that
 * it had decoded before. A callback runs inside vmi_events_listen or vmi_resume_vm.
 */
#ifndef LIBVMI_EVENTS_H
#define LIBVMI_EVENTS_H

#include <libvmi/libvmi.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VMI_EVENTS_VERSION 0x00000009

typedef uint16_t vmi_event_type_t;
#define VMI_EVENT_INVALID 0
#define VMI_EVENT_MEMORY 1
#define VMI_EVENT_REGISTER 2
#define VMI_EVENT_SINGLESTEP 3
#define VMI_EVENT_INTERRUPT 4
#define VMI_EVENT_GUEST_REQUEST 5
#define VMI_EVENT_CPUID 6
#define VMI_EVENT_DEBUG_EXCEPTION 7
#define VMI_EVENT_PRIVILEGED_CALL 8
#define VMI_EVENT_DESCRIPTOR_ACCESS 9
#define VMI_EVENT_FAILED_EMULATION 10
#define VMI_EVENT_DOMAIN_WATCH 11
#define VMI_EVENT_VMEXIT 12
#define VMI_EVENT_IO 13

/* The accesses that an event traps, and the ones that one violation made. */
typedef uint8_t vmi_mem_access_t;
#define VMI_MEMACCESS_INVALID 0
#define VMI_MEMACCESS_N (1 << 0) /* trap nothing */
#define VMI_MEMACCESS_R (1 << 1) /* R and RX alone are refused: the hardware has no such page */
#define VMI_MEMACCESS_W (1 << 2)
#define VMI_MEMACCESS_X (1 << 3)
#define VMI_MEMACCESS_RW (VMI_MEMACCESS_R | VMI_MEMACCESS_W)
#define VMI_MEMACCESS_RX (VMI_MEMACCESS_R | VMI_MEMACCESS_X)
#define VMI_MEMACCESS_WX (VMI_MEMACCESS_W | VMI_MEMACCESS_X)
#define VMI_MEMACCESS_RWX (VMI_MEMACCESS_R | VMI_MEMACCESS_W | VMI_MEMACCESS_X)

/*
 * What a callback asks for, or-ed together. If the hypervisor refuses it, or nobody handles an event, that is not
 * answered, and its vCPU stands still until vmi_destroy.
 */
typedef uint32_t event_response_t;
#define VMI_EVENT_RESPONSE_NONE 0
#define VMI_EVENT_RESPONSE_EMULATE (1u << 1)
/* This one and DENY do nothing on KVM: the write happens. */
#define VMI_EVENT_RESPONSE_EMULATE_NOWRITE (1u << 2)
/* Answer the read with `emul_read`. */
#define VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA (1u << 3)
#define VMI_EVENT_RESPONSE_DENY (1u << 4)
/* Start or stop single-stepping this vCPU. */
#define VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP (1u << 5)
/* Set the vCPU's registers to `*x86_regs`; not together with SET_EMUL_READ_DATA, for the two share a pointer. */
#define VMI_EVENT_RESPONSE_SET_REGISTERS (1u << 7)

#define VMI_EMUL_READ_MAX 256

typedef struct emul_read {
  uint32_t size;     /* at most VMI_EMUL_READ_MAX, or the event is not answered */
  uint8_t dont_free; /* 0: the library calls free() on this structure */
  uint8_t _pad[3];
  uint8_t data[VMI_EMUL_READ_MAX]; /* laid over the read from mem_event.gla on */
} emul_read_t;

typedef struct mem_access_event {
  addr_t gfn;      /* in: the frame to watch, ~0 if generic; out: the frame of this violation */
  uint8_t generic; /* in: handle every frame whose access was set with vmi_set_mem_event */
  vmi_mem_access_t in_access;
  vmi_mem_access_t out_access; /* what this violation wanted */
  uint8_t gptw;                /* never set on KVM */
  uint8_t gla_valid;           /* never set on KVM; gla is valid all the same */
  uint8_t _pad[3];
  addr_t gla;    /* out: the virtual address of the violation */
  addr_t offset; /* out: its offset in the frame */
} mem_access_event_t;

#define MAX_SINGLESTEP_VCPUS 32

typedef struct single_step_event {
  uint32_t vcpus; /* in: one bit for each vCPU */
  uint8_t enable; /* in: start stepping when the event is registered */
  uint8_t _pad[3];
  addr_t gla; /* out: RIP */
  addr_t gfn; /* never set on KVM */
  addr_t offset;
} single_step_event_t;

struct vmi_event;
typedef struct vmi_event vmi_event_t;

typedef event_response_t (*event_callback_t)(vmi_instance_t vmi, vmi_event_t *event);
/* Says that the library no longer uses `event`, and whether clearing it succeeded. */
typedef void (*vmi_event_free_t)(vmi_event_t *event, status_t rc);

/* The caller owns it and keeps it until it is cleared. Zero what is not set. */
struct vmi_event {
  uint32_t version; /* VMI_EVENTS_VERSION */
  vmi_event_type_t type;
  uint16_t slat_id; /* in: the EPT view to change, normally 0; out: the view the vCPU is in */
  uint16_t next_slat_id;
  uint16_t _reserved[3];
  void *data; /* the caller's own */
  event_callback_t callback;
  uint32_t vcpu_id;
  page_mode_t page_mode; /* never set on KVM */
  union {
    mem_access_event_t mem_event;
    single_step_event_t ss_event;
    uint64_t _largest[6];
  };
  union {
    /*
     * Inside the callback, the vCPU's registers; NULL outside. KVMI's events do not tell the MSRs, GDTR and IDTR:
     * these are zero, vmi_get_vcpuregs reads them.
     */
    x86_registers_t *x86_regs;
    emul_read_t *emul_read;
  };
};

VMI_API uint32_t vmi_events_version(void);

/*
 * Starts watching. One memory event per frame, one generic one per kind of access; generic events and events of
 * single frames exclude each other. One single-step event per vCPU.
 */
VMI_API status_t vmi_register_event(vmi_instance_t vmi, vmi_event_t *event);

/*
 * Stops watching and gives the frame its permissions back (a generic event owns no frame: nothing is given back).
 * Inside a callback the work is put off to the end of vmi_events_listen. `free_routine`, if not NULL, is called when
 * it is done.
 */
VMI_API status_t vmi_clear_event(vmi_instance_t vmi, vmi_event_t *event, vmi_event_free_t free_routine);

/*
 * Traps `access` on a frame for the generic event that handles it; VMI_MEMACCESS_N gives the permissions back.
 * Refused while no generic event handles any of `access`.
 */
VMI_API status_t vmi_set_mem_event(vmi_instance_t vmi, addr_t gfn, vmi_mem_access_t access, uint16_t slat_id);

/*
 * Single-steps a vCPU `steps` times, then calls `cb`, or registers `event` again if `cb` is NULL. The stepping ends
 * with the vmi_events_listen that handles the last step. Refused when a single-step event is registered on that vCPU.
 */
VMI_API status_t vmi_step_event(vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu_id, uint64_t steps,
                                event_callback_t cb);

/*
 * Adds a vCPU to a single-step event or takes it out. Fails inside a callback, and when the vCPU already is as it
 * should be; if it was another event's, it is this one's all the same.
 */
VMI_API status_t vmi_toggle_single_step_vcpu(vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu, bool enabled);

/*
 * Has the callbacks handle the events that came with the replies to commands; if there are none, waits up to `timeout`
 * milliseconds for one. Succeeds if nothing has come. Refused inside a callback.
 */
VMI_API status_t vmi_events_listen(vmi_instance_t vmi, uint32_t timeout);

/* Events received but not yet handled, not counting those still on the socket; -1 without VMI_INIT_EVENTS. */
VMI_API int vmi_are_events_pending(vmi_instance_t vmi);

#ifdef __cplusplus
}
#endif

#endif

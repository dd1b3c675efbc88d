#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "instance.h"
#include "log.h"
#include "registers.h"

namespace kvmi {
namespace {

constexpr event_response_t kCarriedOut = VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA | VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP |
                                         VMI_EVENT_RESPONSE_SET_REGISTERS;

/** KVMI's bits for read, write and execute are libvmi's, one place lower. */
vmi_mem_access_t accessFromWire(uint8_t access) {
  static_assert(wire::kAccessRead << 1 == VMI_MEMACCESS_R && wire::kAccessWrite << 1 == VMI_MEMACCESS_W &&
                wire::kAccessExecute << 1 == VMI_MEMACCESS_X);
  return static_cast<vmi_mem_access_t>((access & wire::kAccessAll) << 1);
}

/** Calls the owner of an event with the registers of its vCPU at hand. */
event_response_t call(vmi_instance &vmi, vmi_event_t &handler, const Event &event, x86_registers_t &registers) {
  handler.vcpu_id = event.vcpu();
  handler.slat_id = event.common.view;
  handler.x86_regs = &registers;
  vmi.inCallback = true;
  const event_response_t response = handler.callback(&vmi, &handler);
  vmi.inCallback = false;

  const event_response_t unknown = response & ~kCarriedOut & ~vmi.complainedResponses;
  if (unknown) complain("the responses 0x%x of an event callback have no effect on KVM", unknown);
  vmi.complainedResponses |= unknown;
  return response;
}

/** Takes over the data that a callback wants a read to see, and frees it. */
void takeReadData(vmi_event_t &handler, const x86_registers_t &registers, wire::PageFaultReply &reply) {
  emul_read_t *data = handler.emul_read;
  // A callback that sets no data leaves the pointer to the registers, with which it shares its place.
  if (data == nullptr || handler.x86_regs == &registers) {
    complain("an event callback answered SET_EMUL_READ_DATA without data");
    return;
  }
  if (data->size > sizeof reply.data) {
    complain("%u bytes of emulated data: at most %zu can be sent", data->size, sizeof reply.data);
  } else {
    reply.dataAddress = handler.mem_event.gla;
    reply.dataSize = data->size;
    memcpy(reply.data, data->data, data->size);
  }
  if (!data->dont_free) free(data);
}

void carryOut(vmi_instance &vmi, vmi_event_t &handler, unsigned vcpu, event_response_t response) {
  if (response & VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP) controlSingleStep(&vmi, vcpu, !vmi.vcpus[vcpu].singleStepping);
  if ((response & VMI_EVENT_RESPONSE_SET_REGISTERS) && handler.x86_regs != nullptr) {
    if (response & VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA) {
      complain("an event callback answered with data and with registers: the registers are ignored");
    } else {
      registers_t registers{*handler.x86_regs};
      vmi_set_vcpuregs(&vmi, &registers, vcpu);
    }
  }
}

void pageFault(vmi_instance &vmi, const Event &event) {
  const wire::PageFault &fault = event.pageFault;
  const addr_t gfn = fault.gpa >> kPageShift;
  const vmi_mem_access_t access = accessFromWire(fault.access);
  wire::PageFaultReply reply{};
  if (vmi_event_t *handler = vmi.shuttingDown ? nullptr : vmi.events.memoryEvent(gfn, access)) {
    x86_registers_t registers = fromWire(event.common.general, event.common.special);
    handler->mem_event.gfn = gfn;
    handler->mem_event.out_access = access;
    handler->mem_event.gla = fault.gva;
    handler->mem_event.offset = fault.gpa & kPageOffsetMask;
    const event_response_t response = call(vmi, *handler, event, registers);
    carryOut(vmi, *handler, event.vcpu(), response);
    if (response & VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA) takeReadData(*handler, registers, reply);
    handler->x86_regs = nullptr;
  }
  vmi.connection->answer(event.vcpu(), event.id(), event.sequence, reply);
}

void singleStep(vmi_instance &vmi, const Event &event) {
  const unsigned vcpu = event.vcpu();
  vmi_event_t *handler = vmi.events.singleStep[vcpu];
  if (!vmi.shuttingDown && !event.singleStep.failed && !countStep(&vmi, vcpu) && handler != nullptr) {
    x86_registers_t registers = fromWire(event.common.general, event.common.special);
    handler->ss_event.gla = registers.rip;
    handler->ss_event.offset = registers.rip & kPageOffsetMask;
    const event_response_t response = call(vmi, *handler, event, registers);
    carryOut(vmi, *handler, vcpu, response & ~VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA);
    handler->x86_regs = nullptr;
  }
  vmi.connection->answer(vcpu, event.id(), event.sequence);
}

}  // namespace

void dispatch(vmi_instance_t vmi, const Event &event) {
  vmi_instance::Vcpu &vcpu = vmi->vcpus[event.vcpu()];
  switch (event.id()) {
    case wire::EventId::kPauseVcpu:
      if (vcpu.pausing) {
        vcpu.pauseEvent = event.sequence;
        return;
      }
      break;
    case wire::EventId::kPageFault:
      return pageFault(*vmi, event);
    case wire::EventId::kSingleStep:
      return singleStep(*vmi, event);
    case wire::EventId::kControlRegister:
    case wire::EventId::kMsr: {
      // Nobody asked for it. The answer sets the register, so it repeats the value.
      const wire::RegisterWriteReply reply{event.registerWrite.newValue};
      vmi->connection->answer(event.vcpu(), event.id(), event.sequence, reply);
      return;
    }
  }
  vmi->connection->answer(event.vcpu(), event.id(), event.sequence);
}

void dispatchQueued(vmi_instance_t vmi) {
  for (size_t left = vmi->connection->queuedEvents(); left > 0; left--) {
    const auto event = vmi->connection->nextEvent();
    if (!event) return;  // a callback found the connection dead
    dispatch(vmi, *event);
  }
}

}  // namespace kvmi

using namespace kvmi;

status_t vmi_events_listen(vmi_instance_t vmi, uint32_t timeout) {
  if (vmi == nullptr || !vmi->hasEvents() || vmi->inCallback || timeout > INT32_MAX) return VMI_FAILURE;
  if (!vmi->connection->awaitEvent(Deadline(timeout))) return VMI_FAILURE;
  dispatchQueued(vmi);
  if (clearDeferred(vmi) != VMI_SUCCESS) return VMI_FAILURE;
  return vmi->connection->alive() ? VMI_SUCCESS : VMI_FAILURE;
}

int vmi_are_events_pending(vmi_instance_t vmi) {
  return vmi != nullptr && vmi->hasEvents() ? static_cast<int>(vmi->connection->queuedEvents()) : -1;
}

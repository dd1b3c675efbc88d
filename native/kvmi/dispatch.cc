#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "../vmi/log.h"
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
event_response_t call(Instance &vmi, vmi_event_t &handler, const Event &event, x86_registers_t &registers) {
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

/** Takes over the data that a callback wants a read to see, and frees it. False if it does not fit into an answer. */
bool takeReadData(vmi_event_t &handler, const x86_registers_t &registers, wire::PageFaultReply &reply) {
  emul_read_t *data = handler.emul_read;
  // A callback that sets no data leaves the pointer to the registers, with which it shares its place.
  if (data == nullptr || handler.x86_regs == &registers) {
    complain("an event callback answered SET_EMUL_READ_DATA without data");
    return true;
  }
  const bool fits = data->size <= sizeof reply.data;
  if (fits) {
    reply.dataAddress = handler.mem_event.gla;
    reply.dataSize = data->size;
    memcpy(reply.data, data->data, data->size);
  } else {
    complain("%u bytes of emulated data: at most %zu can be sent", data->size, sizeof reply.data);
  }
  if (!data->dont_free) free(data);
  return fits;
}

/** False if the hypervisor refuses. */
bool carryOut(Instance &vmi, vmi_event_t &handler, unsigned vcpu, event_response_t response) {
  if ((response & VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP) &&
      controlSingleStep(&vmi, vcpu, !vmi.vcpus[vcpu].singleStepping) != VMI_SUCCESS)
    return false;
  if (!(response & VMI_EVENT_RESPONSE_SET_REGISTERS) || handler.x86_regs == nullptr) return true;
  if (response & VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA) {
    complain("an event callback answered with data and with registers: the registers are ignored");
    return true;
  }
  registers_t registers{*handler.x86_regs};
  return vmi_set_vcpuregs(&vmi, &registers, vcpu) == VMI_SUCCESS;
}

/** As in libvmi, the vCPU stands still then until the session ends. */
void leaveUnanswered(const Event &event, const char *reason) {
  complain("an event of kind %u of vCPU %u is not answered: %s", event.common.event, event.vcpu(), reason);
}

void pageFault(Instance &vmi, const Event &event) {
  const wire::PageFault &fault = event.pageFault;
  const addr_t gfn = fault.gpa >> kPageShift;
  const vmi_mem_access_t access = accessFromWire(fault.access);
  vmi_event_t *handler = vmi.events.memoryEvent(gfn, access);
  if (handler == nullptr) return leaveUnanswered(event, "no callback handles this access");

  x86_registers_t registers = fromWire(event.common.general, event.common.special);
  handler->mem_event.gfn = gfn;
  handler->mem_event.out_access = access;
  handler->mem_event.gla = fault.gva;
  handler->mem_event.offset = fault.gpa & kPageOffsetMask;
  const event_response_t response = call(vmi, *handler, event, registers);
  wire::PageFaultReply reply{};
  const bool hasData = response & VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA;
  if (hasData && !takeReadData(*handler, registers, reply))
    leaveUnanswered(event, "its data does not fit");
  else if (!carryOut(vmi, *handler, event.vcpu(), response))
    leaveUnanswered(event, "the hypervisor refused what the callback wants");
  else
    vmi.connection->answer(event.vcpu(), event.id(), event.sequence, reply);
  handler->x86_regs = nullptr;
}

void singleStep(Instance &vmi, const Event &event) {
  const unsigned vcpu = event.vcpu();
  if (!event.singleStep.failed) {
    vmi_event_t *handler = vmi.events.singleStepEvent(vcpu);
    if (handler == nullptr) return leaveUnanswered(event, "no callback handles single steps");
    x86_registers_t registers = fromWire(event.common.general, event.common.special);
    handler->ss_event.gla = registers.rip;
    handler->ss_event.offset = registers.rip & kPageOffsetMask;
    const event_response_t response = call(vmi, *handler, event, registers);
    const bool done = carryOut(vmi, *handler, vcpu, response & ~VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA);
    handler->x86_regs = nullptr;
    if (!done) return leaveUnanswered(event, "the hypervisor refused what the callback wants");
  }
  vmi.connection->answer(vcpu, event.id(), event.sequence);
}

/** Answers without any effect. */
void letGo(Instance &vmi, const Event &event) {
  switch (event.id()) {
    case wire::EventId::kPageFault:
      vmi.connection->answer(event.vcpu(), event.id(), event.sequence, wire::PageFaultReply{});
      return;
    case wire::EventId::kControlRegister:
    case wire::EventId::kMsr:
      // The answer sets the register, so it repeats the value.
      vmi.connection->answer(event.vcpu(), event.id(), event.sequence,
                             wire::RegisterWriteReply{event.registerWrite.newValue});
      return;
    default:
      vmi.connection->answer(event.vcpu(), event.id(), event.sequence);
  }
}

/** Commands of callbacks may bring in events without end; whoever listens has other things to do, too. */
constexpr size_t kMostFurtherEvents = 256;

void dispatch(Instance &vmi, const Event &event) {
  // What vmi_resume_vm answers, be it asked for or not.
  if (event.id() == wire::EventId::kPauseVcpu)
    vmi.vcpus[event.vcpu()].pauseEvent = event.sequence;
  else if (vmi.shuttingDown)
    letGo(vmi, event);
  else if (event.id() == wire::EventId::kPageFault)
    pageFault(vmi, event);
  else if (event.id() == wire::EventId::kSingleStep)
    singleStep(vmi, event);
  else
    leaveUnanswered(event, "nobody asked for it");
}

}  // namespace

void Instance::dispatchQueued() {
  for (size_t left = connection->queuedEvents() + kMostFurtherEvents; left > 0; left--) {
    const auto event = connection->nextEvent();
    if (!event) return;
    dispatch(*this, *event);
  }
}

void letGoOutstanding(Instance &vmi) {
  vmi.dispatchQueued();
  for (unsigned vcpu = 0; vcpu < vmi.vcpuCount; vcpu++) {
    const auto event = vmi.connection->outstanding(vcpu);
    if (event && event->id() != wire::EventId::kPauseVcpu) letGo(vmi, *event);
  }
}

}  // namespace kvmi

using namespace kvmi;

status_t vmi_events_listen(vmi_instance_t vmi, uint32_t timeout) {
  if (vmi == nullptr || !vmi->hasEvents() || vmi->inCallback || timeout > INT32_MAX) return VMI_FAILURE;
  if (!kvmiOf(vmi).connection->awaitEvent(Deadline(timeout))) return VMI_FAILURE;
  vmi->dispatchQueued();
  return clearDeferred(vmi);
}

int vmi_are_events_pending(vmi_instance_t vmi) {
  return vmi != nullptr && vmi->hasEvents() ? static_cast<int>(kvmiOf(vmi).connection->queuedEvents()) : -1;
}

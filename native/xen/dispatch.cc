#include "dispatch.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "../vmi/log.h"
#include "../vmi/registers.h"
#include "domain.h"
#include "registers.h"

namespace xen {
namespace {

vmi_mem_access_t accessOf(uint32_t flags) {
  static_assert(MEM_ACCESS_R << 1 == VMI_MEMACCESS_R && MEM_ACCESS_W << 1 == VMI_MEMACCESS_W &&
                MEM_ACCESS_X << 1 == VMI_MEMACCESS_X);
  return static_cast<vmi_mem_access_t>((flags & MEM_ACCESS_RWX) << 1);
}

/** The answer that changes nothing: a memory access is tried again. */
Response unchanged(const Request &request) {
  Response response{};
  response.version = VM_EVENT_INTERFACE_VERSION;
  response.flags = request.flags & VM_EVENT_FLAG_VCPU_PAUSED;
  response.reason = request.reason;
  response.vcpu_id = request.vcpu_id;
  // By these Xen knows whether there is still something to emulate.
  if (request.reason == VM_EVENT_REASON_MEM_ACCESS) response.u.mem_access = request.u.mem_access;
  return response;
}

/** Takes over the data that a callback wants a read to see, and frees it. */
void takeReadData(vmi_event_t &handler, const x86_registers_t &registers, Response &response) {
  static_assert(VMI_EMUL_READ_MAX <= sizeof response.data.emul.read.data);
  emul_read_t *data = handler.emul_read;
  response.flags |= VM_EVENT_FLAG_EMULATE;
  // A callback that sets no data leaves the pointer to the registers, with which it shares its place.
  if (data == nullptr || handler.x86_regs == &registers)
    return complain("an event callback answered SET_EMUL_READ_DATA without data");
  auto &read = response.data.emul.read;
  read.size = data->size < VMI_EMUL_READ_MAX ? data->size : VMI_EMUL_READ_MAX;
  memcpy(read.data, data->data, read.size);
  response.flags |= VM_EVENT_FLAG_SET_EMUL_READ_DATA;
  if (!data->dont_free) free(data);
}

/** What the owner of an event answers, with the registers of its vCPU at hand. */
Response ask(Instance &vmi, vmi_event_t &handler, const Request &request) {
  x86_registers_t registers = fromEvent(request.data.regs.x86);
  handler.vcpu_id = request.vcpu_id;
  handler.slat_id = request.altp2m_idx;
  handler.x86_regs = &registers;
  vmi.inCallback = true;
  const event_response_t wanted = handler.callback(&vmi, &handler);
  vmi.inCallback = false;

  Response response = unchanged(request);
  if (wanted & VMI_EVENT_RESPONSE_EMULATE) response.flags |= VM_EVENT_FLAG_EMULATE;
  if (wanted & VMI_EVENT_RESPONSE_EMULATE_NOWRITE)
    response.flags |= VM_EVENT_FLAG_EMULATE | VM_EVENT_FLAG_EMULATE_NOWRITE;
  if (wanted & VMI_EVENT_RESPONSE_DENY) response.flags |= VM_EVENT_FLAG_DENY;
  if (wanted & VMI_EVENT_RESPONSE_TOGGLE_SINGLESTEP) response.flags |= VM_EVENT_FLAG_TOGGLE_SINGLESTEP;
  if (wanted & VMI_EVENT_RESPONSE_SET_EMUL_READ_DATA) {
    takeReadData(handler, registers, response);
    if (wanted & VMI_EVENT_RESPONSE_SET_REGISTERS)
      complain("an event callback answered with data and with registers: the registers are ignored");
  } else if ((wanted & VMI_EVENT_RESPONSE_SET_REGISTERS) && handler.x86_regs != nullptr) {
    response.data.regs = request.data.regs;
    copyGeneral(response.data.regs.x86, *handler.x86_regs);
    response.flags |= VM_EVENT_FLAG_SET_REGISTERS;
  }
  handler.x86_regs = nullptr;
  return response;
}

vmi_event_t *memoryHandler(Instance &vmi, const Request &request) {
  const vm_event_mem_access &access = request.u.mem_access;
  vmi_event_t *handler = vmi.events.memoryEvent(access.gfn, accessOf(access.flags));
  if (handler == nullptr) return nullptr;
  handler->mem_event.gfn = access.gfn;
  handler->mem_event.out_access = accessOf(access.flags);
  handler->mem_event.gptw = (access.flags & MEM_ACCESS_FAULT_IN_GPT) != 0;
  handler->mem_event.gla_valid = (access.flags & MEM_ACCESS_GLA_VALID) != 0;
  handler->mem_event.gla = handler->mem_event.gla_valid ? access.gla : 0;
  handler->mem_event.offset = access.offset & kPageOffsetMask;
  return handler;
}

vmi_event_t *stepHandler(Instance &vmi, const Request &request) {
  vmi_event_t *handler = vmi.events.singleStepEvent(request.vcpu_id);
  if (handler == nullptr) return nullptr;
  const addr_t rip = request.data.regs.x86.rip;
  handler->ss_event.gla = rip;
  handler->ss_event.gfn = request.u.singlestep.gfn;
  handler->ss_event.offset = rip & kPageOffsetMask;
  return handler;
}

vmi_event_t *handlerOf(Instance &vmi, const Request &request) {
  switch (request.reason) {
    case VM_EVENT_REASON_MEM_ACCESS:
      return memoryHandler(vmi, request);
    case VM_EVENT_REASON_SINGLESTEP:
      return stepHandler(vmi, request);
    default:
      return nullptr;
  }
}

void dispatch(Instance &vmi, const Request &request) {
  const bool isOurs = request.version == VM_EVENT_INTERFACE_VERSION && vmi.hasVcpu(request.vcpu_id);
  if (!isOurs) {
    complain("an event of version %u and vCPU %u", request.version, request.vcpu_id);
    return vmi.monitor->answer(unchanged(request));
  }
  if (vmi_event_t *handler = handlerOf(vmi, request)) return vmi.monitor->answer(ask(vmi, *handler, request));
  // As in libvmi, the vCPU stands still then until the session ends: run again, the access would be reported for ever.
  complain("an event of kind %u of vCPU %u is not answered: no callback handles it", request.reason, request.vcpu_id);
  vmi.unanswered[request.vcpu_id] = request;
}

}  // namespace

void Instance::dispatchQueued() {
  if (!monitor) return;
  // No more than were there: vCPUs that are let go meanwhile raise others.
  for (unsigned left = monitor->pending(); left > 0; left--) {
    const auto request = monitor->next();
    if (!request) break;
    dispatch(*this, *request);
  }
  monitor->deliver();
}

void letGoOutstanding(Instance &vmi) {
  while (const auto request = vmi.monitor->next()) vmi.monitor->answer(unchanged(*request));
  for (auto &request : vmi.unanswered) {
    if (request) vmi.monitor->answer(unchanged(*request));
    request.reset();
  }
  vmi.monitor->deliver();
}

}  // namespace xen

using namespace xen;

status_t vmi_events_listen(vmi_instance_t vmi, uint32_t timeout) {
  if (vmi == nullptr || !vmi->hasEvents() || vmi->inCallback || timeout > INT32_MAX) return VMI_FAILURE;
  Instance &xen = xenOf(vmi);
  if (!xen.monitor->await(Deadline(timeout))) {
    const auto info = domainInfo(xen.control.get(), xen.domain);
    if (!info || (info->flags & XEN_DOMINF_shutdown)) {
      complain("the guest %s", info ? "has shut down or crashed" : "is gone");
      return VMI_FAILURE;
    }
  }
  xen.dispatchQueued();
  return clearDeferred(vmi);
}

int vmi_are_events_pending(vmi_instance_t vmi) {
  return vmi != nullptr && vmi->hasEvents() ? static_cast<int>(xenOf(vmi).monitor->pending()) : -1;
}

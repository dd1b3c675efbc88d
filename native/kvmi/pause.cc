#include "../vmi/log.h"
#include "instance.h"

namespace kvmi {
namespace {

constexpr uint32_t kStopTimeoutMs = 10'000;

/** Has events handled until the vCPU has reported that it stands still. */
bool awaitStop(Instance &vmi, const Instance::Vcpu &vcpu, const Deadline &deadline) {
  while (!vcpu.pauseEvent) {
    // Inside a callback, the vCPU whose event is being handled cannot stop before the callback returns.
    if (vmi.inCallback || deadline.passed() || !vmi.connection->awaitEvent(deadline)) return false;
    vmi.dispatchQueued();
  }
  return true;
}

}  // namespace
}  // namespace kvmi

using namespace kvmi;

status_t vmi_pause_vm(vmi_instance_t vmi) {
  if (vmi == nullptr) return VMI_FAILURE;
  if (vmi->pauseCount == 0 && !kvmiOf(vmi).connection->pauseAll()) return VMI_FAILURE;
  vmi->pauseCount++;
  return VMI_SUCCESS;
}

status_t vmi_resume_vm(vmi_instance_t vmi) {
  if (vmi == nullptr) return VMI_FAILURE;
  if (vmi->pauseCount == 0) return VMI_SUCCESS;
  if (vmi->pauseCount > 1) {
    vmi->pauseCount--;
    return VMI_SUCCESS;
  }
  Instance &kvmi = kvmiOf(vmi);
  const Deadline deadline(kStopTimeoutMs);
  // All or none: after a failure the guest must not be half awake and yet count as paused.
  for (unsigned index = 0; index < kvmi.vcpuCount; index++) {
    if (!awaitStop(kvmi, kvmi.vcpus[index], deadline)) {
      complain("vCPU %u did not stop, so the guest cannot be resumed", index);
      return VMI_FAILURE;
    }
  }
  for (unsigned index = 0; index < kvmi.vcpuCount; index++) {
    Instance::Vcpu &vcpu = kvmi.vcpus[index];
    if (!kvmi.connection->answer(index, wire::EventId::kPauseVcpu, *vcpu.pauseEvent)) return VMI_FAILURE;
    vcpu.pauseEvent.reset();
  }
  vmi->pauseCount = 0;
  return VMI_SUCCESS;
}

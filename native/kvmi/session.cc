#include "../vmi/log.h"
#include "dispatch.h"
#include "instance.h"
#include "listener.h"

const char *const vmi::kLibraryName = "kvmi";

namespace kvmi {
namespace {

constexpr uint32_t kAttachTimeoutMs = 10'000;
/** More than any KVM offers. */
constexpr uint32_t kMaxVcpus = 4096;
/** Physical addresses have at most 52 bits. */
constexpr uint64_t kMaxFrames = uint64_t{1} << 40;

/** The kinds of events that are switched on for the whole session; they cost nothing until something is watched. */
constexpr wire::EventId kSessionEvents[] = {wire::EventId::kControlRegister, wire::EventId::kMsr,
                                            wire::EventId::kPageFault, wire::EventId::kSingleStep};

bool namesOneGuest(const void *domain, uint64_t flags) {
  const uint64_t naming = flags & (VMI_INIT_DOMAINNAME | VMI_INIT_DOMAINID | VMI_INIT_DOMAINUUID);
  return domain != nullptr && (naming == VMI_INIT_DOMAINNAME || naming == VMI_INIT_DOMAINID ||
                               naming == VMI_INIT_DOMAINUUID);
}

std::unique_ptr<Connection> connect(const vmi_init_data_t *data) {
  if (data == nullptr || data->count < 1 || data->entry[0].type != VMI_INIT_DATA_KVMI_SOCKET) {
    complain("entry 0 of the init data has to be VMI_INIT_DATA_KVMI_SOCKET");
    return nullptr;
  }
  auto listener = Listener::open(static_cast<const char *>(data->entry[0].data));
  if (!listener) return nullptr;
  const Deadline deadline(kAttachTimeoutMs);
  while (UniqueFd socket = listener->accept(deadline))
    if (auto connection = Connection::establish(std::move(socket), deadline)) return connection;
  complain("no hypervisor connected within %u seconds", kAttachTimeoutMs / 1000);
  return nullptr;
}

bool countVcpus(Instance &vmi) {
  wire::GuestInfo info;
  if (!vmi.connection->request(wire::MessageId::kGetGuestInfo, {}, &info, sizeof info)) return false;
  if (info.vcpuCount < 1 || info.vcpuCount > kMaxVcpus) {
    complain("a guest with %u vCPUs", info.vcpuCount);
    return false;
  }
  vmi.vcpuCount = info.vcpuCount;
  vmi.vcpus.resize(info.vcpuCount);
  vmi.connection->expectVcpus(info.vcpuCount);
  return true;
}

bool controlSessionEvents(Instance &vmi, bool enable) {
  for (size_t vcpu = 0; vcpu < vmi.vcpuCount; vcpu++) {
    for (const wire::EventId id : kSessionEvents) {
      wire::VcpuHeader header{};
      header.vcpu = static_cast<uint16_t>(vcpu);
      wire::ControlEvents command{};
      command.event = static_cast<uint16_t>(id);
      command.enable = enable;
      if (!vmi.connection->request(wire::MessageId::kControlEvents, {header, command})) return false;
    }
  }
  return true;
}

bool measureMemory(Instance &vmi) {
  uint64_t frames;
  if (!vmi.connection->request(wire::MessageId::kGetMaxGfn, {}, &frames, sizeof frames)) return false;
  if (frames > kMaxFrames) {
    complain("a guest with 0x%llx frames of memory", static_cast<unsigned long long>(frames));
    return false;
  }
  vmi.maxPhysicalAddress = frames << kPageShift;
  return true;
}

}  // namespace
}  // namespace kvmi

using namespace kvmi;

status_t vmi_init(vmi_instance_t *vmi, vmi_mode_t mode, const void *domain, uint64_t init_flags,
                  vmi_init_data_t *init_data, vmi_init_error_t *error) {
  if (vmi == nullptr) return VMI_FAILURE;
  *vmi = nullptr;
  const auto fail = [error](vmi_init_error_t reason) {
    if (error != nullptr) *error = reason;
    return VMI_FAILURE;
  };
  // As libvmi answers for a driver that it was not built with.
  if (mode != VMI_KVM) return VMI_FAILURE;
  if (!namesOneGuest(domain, init_flags)) return fail(VMI_INIT_ERROR_VM_NOT_FOUND);

  auto instance = std::make_unique<Instance>();
  instance->initFlags = init_flags;
  instance->connection = connect(init_data);
  if (!instance->connection || !countVcpus(*instance) ||
      (instance->hasEvents() && !controlSessionEvents(*instance, true)) || !measureMemory(*instance))
    return fail(VMI_INIT_ERROR_DRIVER);
  *vmi = instance.release();
  return VMI_SUCCESS;
}

status_t vmi_destroy(vmi_instance_t vmi) {
  if (vmi == nullptr || vmi->inCallback) return VMI_FAILURE;
  Instance &kvmi = kvmiOf(vmi);
  kvmi.shuttingDown = true;
  if (vmi->hasEvents()) {
    if (vmi->pauseCount == 0) vmi_pause_vm(vmi);
    stopSingleSteps(vmi);
    controlSessionEvents(kvmi, false);
    letGoOutstanding(kvmi);
  }
  // However often it was paused: nobody is left to resume it.
  if (vmi->pauseCount > 0) {
    vmi->pauseCount = 1;
    vmi_resume_vm(vmi);
  }
  releaseDeferred(vmi);
  delete vmi;
  return VMI_SUCCESS;
}

addr_t vmi_get_max_physical_address(vmi_instance_t vmi) {
  return vmi != nullptr && measureMemory(kvmiOf(vmi)) ? vmi->maxPhysicalAddress : 0;
}

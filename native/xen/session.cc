#include <cerrno>
#include <cstring>

#include "../vmi/log.h"
#include "domain.h"
#include "instance.h"

const char *const vmi::kLibraryName = "xen";

namespace xen {
namespace {

/** More than any Xen offers. */
constexpr uint32_t kMaxVcpus = 4096;
/** Physical addresses have at most 52 bits. */
constexpr xen_pfn_t kMaxFrames = xen_pfn_t{1} << 40;

std::optional<uint32_t> domainOf(xc_interface *control, const void *domain, uint64_t flags) {
  if (domain == nullptr) return std::nullopt;
  switch (flags & (VMI_INIT_DOMAINNAME | VMI_INIT_DOMAINID | VMI_INIT_DOMAINUUID)) {
    case VMI_INIT_DOMAINNAME:
      return findDomain(control, static_cast<const char *>(domain));
    case VMI_INIT_DOMAINID: {
      uint64_t id;
      memcpy(&id, domain, sizeof id);
      if (id >= DOMID_FIRST_RESERVED) return std::nullopt;
      return static_cast<uint32_t>(id);
    }
    default:
      return std::nullopt;
  }
}

bool measureMemory(Instance &vmi) {
  xen_pfn_t last;
  if (xc_domain_maximum_gpfn(vmi.control.get(), vmi.domain, &last) != 0) return false;
  if (last >= kMaxFrames) {
    complain("a guest with frame 0x%llx", static_cast<unsigned long long>(last));
    return false;
  }
  vmi.maxPhysicalAddress = (last + 1) << kPageShift;
  return true;
}

bool prepare(Instance &vmi, const DomainInfo &info) {
  if (!(info.flags & XEN_DOMINF_hvm_guest) || !(info.flags & XEN_DOMINF_hap)) {
    complain("domain %u is no HVM or PVH guest with hardware-assisted paging", vmi.domain);
    return false;
  }
  if (info.max_vcpu_id >= kMaxVcpus) {
    complain("a guest with vCPU %u", info.max_vcpu_id);
    return false;
  }
  vmi.vcpuCount = info.max_vcpu_id + 1;
  vmi.unanswered.resize(vmi.vcpuCount);
  vmi.foreignMemory.reset(xenforeignmemory_open(nullptr, 0));
  if (!vmi.foreignMemory) {
    complain("the guest's memory cannot be reached: %s", strerror(errno));
    return false;
  }
  return measureMemory(vmi);
}

}  // namespace
}  // namespace xen

using namespace xen;

status_t vmi_init(vmi_instance_t *vmi, vmi_mode_t mode, const void *domain, uint64_t init_flags, vmi_init_data_t *,
                  vmi_init_error_t *error) {
  if (vmi == nullptr) return VMI_FAILURE;
  *vmi = nullptr;
  const auto fail = [error](vmi_init_error_t reason) {
    if (error != nullptr) *error = reason;
    return VMI_FAILURE;
  };
  // As libvmi answers for a driver that it was not built with.
  if (mode != VMI_XEN) return VMI_FAILURE;

  auto instance = std::make_unique<Instance>();
  instance->initFlags = init_flags;
  instance->control.reset(xc_interface_open(nullptr, nullptr, 0));
  if (!instance->control) {
    complain("Xen cannot be reached (only root in dom0 can): %s", strerror(errno));
    return fail(VMI_INIT_ERROR_DRIVER);
  }
  const auto found = domainOf(instance->control.get(), domain, init_flags);
  const auto info = found ? domainInfo(instance->control.get(), *found) : std::nullopt;
  if (!info) return fail(VMI_INIT_ERROR_VM_NOT_FOUND);
  instance->domain = *found;
  if (!prepare(*instance, *info)) return fail(VMI_INIT_ERROR_DRIVER);
  if (instance->hasEvents()) {
    instance->monitor = Monitor::enable(instance->control.get(), instance->domain);
    if (!instance->monitor) return fail(VMI_INIT_ERROR_EVENTS);
  }
  *vmi = instance.release();
  return VMI_SUCCESS;
}

status_t vmi_destroy(vmi_instance_t vmi) {
  if (vmi == nullptr || vmi->inCallback) return VMI_FAILURE;
  releaseDeferred(vmi);
  delete vmi;
  return VMI_SUCCESS;
}

addr_t vmi_get_max_physical_address(vmi_instance_t vmi) {
  return vmi != nullptr && measureMemory(xenOf(vmi)) ? vmi->maxPhysicalAddress : 0;
}

status_t vmi_pause_vm(vmi_instance_t vmi) {
  if (vmi == nullptr) return VMI_FAILURE;
  if (vmi->pauseCount == 0 && !xenOf(vmi).pause()) return VMI_FAILURE;
  vmi->pauseCount++;
  return VMI_SUCCESS;
}

status_t vmi_resume_vm(vmi_instance_t vmi) {
  if (vmi == nullptr) return VMI_FAILURE;
  if (vmi->pauseCount == 0) return VMI_SUCCESS;
  if (vmi->pauseCount == 1 && !xenOf(vmi).resume()) return VMI_FAILURE;
  vmi->pauseCount--;
  return VMI_SUCCESS;
}

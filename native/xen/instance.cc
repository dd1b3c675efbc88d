#include "instance.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "../vmi/log.h"
#include "dispatch.h"

namespace xen {
namespace {

/** A frame of the guest, while it is being copied. */
class Mapping {
 public:
  Mapping(const Instance &vmi, addr_t gfn, int protection) : memory_(vmi.foreignMemory.get()) {
    const xen_pfn_t frame = gfn;
    bytes_ = static_cast<uint8_t *>(xenforeignmemory_map(memory_, vmi.domain, protection, 1, &frame, nullptr));
  }
  Mapping(const Mapping &) = delete;
  Mapping &operator=(const Mapping &) = delete;
  ~Mapping() {
    if (bytes_ != nullptr) xenforeignmemory_unmap(memory_, bytes_, 1);
  }

  /** Null if there is no memory in the frame. */
  uint8_t *bytes() const { return bytes_; }

 private:
  xenforeignmemory_handle *memory_;
  uint8_t *bytes_;
};

xenmem_access_t permitted(vmi_mem_access_t trapped) {
  static_assert(XENMEM_access_r << 1 == VMI_MEMACCESS_R && XENMEM_access_w << 1 == VMI_MEMACCESS_W &&
                XENMEM_access_x << 1 == VMI_MEMACCESS_X);
  return static_cast<xenmem_access_t>(XENMEM_access_rwx & ~(trapped >> 1));
}

}  // namespace

Instance::~Instance() {
  if (monitor) {
    const bool paused = pause();
    while (!trapped.empty()) {
      const addr_t gfn = *trapped.begin();
      // One that cannot be had back belongs to a guest that has gone.
      if (!trap(gfn, VMI_MEMACCESS_N, 0)) trapped.erase(gfn);
    }
    if (singleSteps) stopSingleSteps(this);
    letGoOutstanding(*this);
    monitor.reset();
    if (paused) resume();
  }
  // However often it was paused: nobody is left to resume it.
  if (pauseCount > 0) resume();
}

std::optional<Page> Instance::fetchPage(addr_t gfn) {
  const Mapping mapping(*this, gfn, PROT_READ);
  if (mapping.bytes() == nullptr) return std::nullopt;
  std::optional<Page> page(std::in_place);
  memcpy(page->data(), mapping.bytes(), page->size());
  return page;
}

bool Instance::writeWithinPage(addr_t pa, const void *from, size_t size) {
  const Mapping mapping(*this, pa >> kPageShift, PROT_READ | PROT_WRITE);
  if (mapping.bytes() == nullptr) return false;
  memcpy(mapping.bytes() + (pa & kPageOffsetMask), from, size);
  return true;
}

bool Instance::trap(addr_t gfn, vmi_mem_access_t accesses, uint16_t view) {
  if (view != 0) {
    complain("there is no view %u", view);
    return false;
  }
  if (xc_set_mem_access(control.get(), domain, permitted(accesses), gfn, 1) != 0) {
    complain("the permissions of frame 0x%llx cannot be changed: %s", static_cast<unsigned long long>(gfn),
             strerror(errno));
    return false;
  }
  if (accesses == VMI_MEMACCESS_N)
    trapped.erase(gfn);
  else
    trapped.insert(gfn);
  return true;
}

bool Instance::prepareSingleSteps() {
  if (singleSteps) return true;
  uint32_t capabilities = 0;
  const bool offered = xc_monitor_get_capabilities(control.get(), domain, &capabilities) == 0 &&
                       (capabilities >> XEN_DOMCTL_MONITOR_EVENT_SINGLESTEP & 1);
  singleSteps = offered && xc_monitor_singlestep(control.get(), domain, true) == 0;
  if (!singleSteps) complain("Xen cannot single-step here: the processor has no monitor trap flag");
  return singleSteps;
}

bool Instance::setSingleStep(uint32_t vcpu, bool enable) {
  const uint32_t operation = enable ? XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_ON : XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF;
  return xc_domain_debug_control(control.get(), domain, operation, vcpu) == 0;
}

bool Instance::pause() { return xc_domain_pause(control.get(), domain) == 0; }

bool Instance::resume() { return xc_domain_unpause(control.get(), domain) == 0; }

}  // namespace xen

#pragma once

#include <libvmi/events.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "../vmi/instance.h"
#include "handles.h"
#include "monitor.h"

namespace xen {

using namespace vmi;

struct Instance final : vmi_instance {
  /** Leaves the guest as if nobody had watched it. */
  ~Instance() override;

  /** Memory is mapped only while it is copied: the guest may put another page into the frame's place at any time. */
  std::optional<Page> fetchPage(addr_t gfn) override;
  bool writeWithinPage(addr_t pa, const void *from, size_t size) override;
  bool trap(addr_t gfn, vmi_mem_access_t accesses, uint16_t view) override;
  bool prepareSingleSteps() override;
  bool setSingleStep(uint32_t vcpu, bool enable) override;
  void dispatchQueued() override;

  bool pause();
  bool resume();

  Control control;
  ForeignMemory foreignMemory;
  uint32_t domain = 0;
  /** Null without VMI_INIT_EVENTS. */
  std::unique_ptr<Monitor> monitor;
  std::set<addr_t> trapped;
  bool singleSteps = false;
  /** By vCPU: what it raised and nobody could answer. */
  std::vector<std::optional<Request>> unanswered;
};

/** Every instance of this library is one. */
inline Instance &xenOf(vmi_instance_t vmi) { return static_cast<Instance &>(*vmi); }

}  // namespace xen

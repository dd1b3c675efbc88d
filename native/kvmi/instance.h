#pragma once

#include <libvmi/events.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "../vmi/instance.h"
#include "connection.h"

namespace kvmi {

using namespace vmi;

struct Instance final : vmi_instance {
  struct Vcpu {
    /** The number of the event with which it reported that it stands still; resume answers it. */
    std::optional<uint32_t> pauseEvent;
    bool singleStepping = false;
  };

  /** As libvmi does, whole pages are asked for, however little of them is needed. */
  std::optional<Page> fetchPage(addr_t gfn) override;
  bool writeWithinPage(addr_t pa, const void *from, size_t size) override;
  bool trap(addr_t gfn, vmi_mem_access_t accesses, uint16_t view) override;
  bool prepareSingleSteps() override { return true; }
  bool setSingleStep(uint32_t vcpu, bool enable) override;
  void dispatchQueued() override;

  std::unique_ptr<Connection> connection;
  std::vector<Vcpu> vcpus;
  bool shuttingDown = false;
  /** Responses that KVM cannot carry out and that were complained about already. */
  event_response_t complainedResponses = 0;
};

/** Every instance of this library is one. */
inline Instance &kvmiOf(vmi_instance_t vmi) { return static_cast<Instance &>(*vmi); }

}  // namespace kvmi

#pragma once

#include <libvmi/events.h>

#include <cstdint>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

namespace vmi {

/** What the caller watches. Events are the caller's; here are only pointers to them. */
struct EventTables {
  std::unordered_map<addr_t, vmi_event_t *> byFrame;
  /** By the access that they were registered for. */
  std::vector<std::pair<vmi_mem_access_t, vmi_event_t *>> generic;
  /** By vCPU; by one that does not exist, too, if somebody toggled its single steps. */
  std::map<uint32_t, vmi_event_t *> singleStep;

  /** A request of vmi_step_event. */
  struct Countdown {
    vmi_event_t *event;
    uint32_t vcpu;
    uint64_t steps;
    event_callback_t callback;
  };
  std::vector<Countdown> countdowns;
  /** By vCPU: the library's own events, registered while it counts steps there. */
  std::map<uint32_t, vmi_event_t> counting;

  /** vmi_clear_event inside a callback, put off. */
  std::vector<std::pair<vmi_event_t *, vmi_event_free_t>> clears;

  /** Who handles `access` on a frame; null if nobody does. The first that was registered wins. */
  vmi_event_t *memoryEvent(addr_t gfn, vmi_mem_access_t access) const;
  vmi_event_t *singleStepEvent(uint32_t vcpu) const;
};

/** Clears what callbacks asked to be cleared, with the guest paused and every queued event handled. */
status_t clearDeferred(vmi_instance_t vmi);

/** Tells the owners of events whose clearing was put off that they are free now. */
void releaseDeferred(vmi_instance_t vmi);

status_t controlSingleStep(vmi_instance_t vmi, uint32_t vcpu, bool enable);

/** On every vCPU, until one refuses. */
void stopSingleSteps(vmi_instance_t vmi);

}  // namespace vmi

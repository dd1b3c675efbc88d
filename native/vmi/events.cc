#include "events.h"

#include <algorithm>

#include "instance.h"
#include "log.h"

namespace vmi {

vmi_event_t *EventTables::memoryEvent(addr_t gfn, vmi_mem_access_t access) const {
  const auto found = byFrame.find(gfn);
  if (found != byFrame.end() && (found->second->mem_event.in_access & access)) return found->second;
  for (const auto &[handled, event] : generic)
    if (handled & access) return event;
  return nullptr;
}

vmi_event_t *EventTables::singleStepEvent(uint32_t vcpu) const {
  const auto found = singleStep.find(vcpu);
  return found == singleStep.end() ? nullptr : found->second;
}

namespace {

constexpr addr_t kEveryFrame = ~addr_t{0};
constexpr addr_t kMaxFrame = (addr_t{1} << 40) - 1;

bool selects(const vmi_event_t *event, uint32_t vcpu) {
  return vcpu < MAX_SINGLESTEP_VCPUS && (event->ss_event.vcpus >> vcpu & 1);
}

bool canBeTrapped(vmi_mem_access_t access) {
  switch (access) {
    case VMI_MEMACCESS_N:
    case VMI_MEMACCESS_W:
    case VMI_MEMACCESS_X:
    case VMI_MEMACCESS_RW:
    case VMI_MEMACCESS_WX:
    case VMI_MEMACCESS_RWX:
      return true;
    case VMI_MEMACCESS_R:
    case VMI_MEMACCESS_RX:
      complain("trapping reads but not writes is unsupported by EPT: use VMI_MEMACCESS_RW");
      return false;
    default:
      complain("0x%x is not an access that can be trapped", access);
      return false;
  }
}

status_t trap(vmi_instance_t vmi, addr_t gfn, vmi_mem_access_t access, uint16_t view) {
  if (!canBeTrapped(access) || gfn > kMaxFrame) return VMI_FAILURE;
  return vmi->trap(gfn, access, view) ? VMI_SUCCESS : VMI_FAILURE;
}

/** As libvmi concludes: the hypervisor has accepted the frame, so memory reaches up to it. */
void noteFrame(vmi_instance_t vmi, addr_t gfn) {
  vmi->maxPhysicalAddress = std::max(vmi->maxPhysicalAddress, gfn << kPageShift);
}

status_t registerGeneric(vmi_instance_t vmi, vmi_event_t *event) {
  EventTables &events = vmi->events;
  if (event->mem_event.gfn != kEveryFrame || !events.byFrame.empty()) return VMI_FAILURE;
  const vmi_mem_access_t access = event->mem_event.in_access;
  for (const auto &other : events.generic)
    if (other.first == access) return VMI_FAILURE;
  events.generic.emplace_back(access, event);
  return VMI_SUCCESS;
}

status_t registerOnFrame(vmi_instance_t vmi, vmi_event_t *event) {
  EventTables &events = vmi->events;
  const addr_t gfn = event->mem_event.gfn;
  if (!events.generic.empty() || events.byFrame.count(gfn) > 0) return VMI_FAILURE;
  if (trap(vmi, gfn, event->mem_event.in_access, event->slat_id) != VMI_SUCCESS) return VMI_FAILURE;
  events.byFrame.emplace(gfn, event);
  noteFrame(vmi, gfn);
  return VMI_SUCCESS;
}

/** Starts them on every vCPU that the event selects; if one refuses, stops them on all of these. */
status_t startSingleSteps(vmi_instance_t vmi, const vmi_event_t *event) {
  if (event->ss_event.vcpus == 0) return VMI_FAILURE;
  if (!event->ss_event.enable) return VMI_SUCCESS;
  for (uint32_t vcpu = 0; vcpu < vmi->vcpuCount; vcpu++) {
    if (!selects(event, vcpu) || controlSingleStep(vmi, vcpu, true) == VMI_SUCCESS) continue;
    for (uint32_t selected = 0; selected < vmi->vcpuCount; selected++)
      if (selects(event, selected)) controlSingleStep(vmi, selected, false);
    return VMI_FAILURE;
  }
  return VMI_SUCCESS;
}

status_t registerSingleStep(vmi_instance_t vmi, vmi_event_t *event) {
  EventTables &events = vmi->events;
  for (uint32_t vcpu = 0; vcpu < vmi->vcpuCount; vcpu++)
    if (selects(event, vcpu) && events.singleStepEvent(vcpu) != nullptr) return VMI_FAILURE;
  if (!vmi->prepareSingleSteps() || startSingleSteps(vmi, event) != VMI_SUCCESS) return VMI_FAILURE;
  for (uint32_t vcpu = 0; vcpu < vmi->vcpuCount; vcpu++)
    if (selects(event, vcpu)) events.singleStep[vcpu] = event;
  return VMI_SUCCESS;
}

status_t clearMemory(vmi_instance_t vmi, vmi_event_t *event) {
  EventTables &events = vmi->events;
  if (event->mem_event.generic) {
    const auto same = [event](const auto &other) { return other.first == event->mem_event.in_access; };
    events.generic.erase(std::remove_if(events.generic.begin(), events.generic.end(), same), events.generic.end());
    return VMI_SUCCESS;
  }
  const status_t status = trap(vmi, event->mem_event.gfn, VMI_MEMACCESS_N, event->slat_id);
  if (status == VMI_SUCCESS) events.byFrame.erase(event->mem_event.gfn);
  return status;
}

status_t clearSingleStep(vmi_instance_t vmi, vmi_event_t *event) {
  auto &owners = vmi->events.singleStep;
  status_t status = VMI_FAILURE;
  for (uint32_t vcpu = 0; vcpu < vmi->vcpuCount; vcpu++) {
    if (!selects(event, vcpu)) continue;
    status = controlSingleStep(vmi, vcpu, false);
    if (status == VMI_SUCCESS) owners.erase(vcpu);
  }
  if (owners.empty()) stopSingleSteps(vmi);
  return status;
}

/** The callback of the events that count the steps of vmi_step_event. */
event_response_t countStep(vmi_instance_t vmi, vmi_event_t *steps) {
  const uint32_t vcpu = steps->vcpu_id;
  auto &countdowns = vmi->events.countdowns;
  std::vector<EventTables::Countdown> finished;
  for (auto &countdown : countdowns)
    if (countdown.vcpu == vcpu && --countdown.steps == 0) finished.push_back(countdown);
  const auto isDone = [](const auto &countdown) { return countdown.steps == 0; };
  countdowns.erase(std::remove_if(countdowns.begin(), countdowns.end(), isDone), countdowns.end());

  // These may ask for more steps.
  for (const auto &countdown : finished) {
    if (countdown.callback != nullptr)
      countdown.callback(vmi, countdown.event);
    else
      vmi_register_event(vmi, countdown.event);
  }
  const auto isHere = [vcpu](const auto &countdown) { return countdown.vcpu == vcpu; };
  // Inside this callback it is put off: a step that is under way still has its handler.
  if (std::none_of(countdowns.begin(), countdowns.end(), isHere)) vmi_clear_event(vmi, steps, nullptr);
  return VMI_EVENT_RESPONSE_NONE;
}

/** Has the library count the vCPU's steps; false where somebody else has its steps, or the counting is ending. */
bool startCounting(vmi_instance_t vmi, uint32_t vcpu) {
  EventTables &events = vmi->events;
  vmi_event_t *steps = &events.counting[vcpu];
  if (const vmi_event_t *owner = events.singleStepEvent(vcpu)) {
    const auto isIt = [steps](const auto &clear) { return clear.first == steps; };
    return owner == steps && std::none_of(events.clears.begin(), events.clears.end(), isIt);
  }
  *steps = {};
  steps->version = VMI_EVENTS_VERSION;
  steps->type = VMI_EVENT_SINGLESTEP;
  steps->callback = countStep;
  steps->ss_event.vcpus = uint32_t{1} << vcpu;
  steps->ss_event.enable = true;
  return registerSingleStep(vmi, steps) == VMI_SUCCESS;
}

}  // namespace

status_t controlSingleStep(vmi_instance_t vmi, uint32_t vcpu, bool enable) {
  return vmi->hasVcpu(vcpu) && vmi->setSingleStep(vcpu, enable) ? VMI_SUCCESS : VMI_FAILURE;
}

void stopSingleSteps(vmi_instance_t vmi) {
  for (uint32_t vcpu = 0; vcpu < vmi->vcpuCount; vcpu++)
    if (controlSingleStep(vmi, vcpu, false) != VMI_SUCCESS) return;
}

status_t clearDeferred(vmi_instance_t vmi) {
  auto &clears = vmi->events.clears;
  if (clears.empty()) return VMI_SUCCESS;
  if (vmi_pause_vm(vmi) != VMI_SUCCESS) return VMI_FAILURE;
  // All that was raised before the pause is queued by now, and may belong to an event to be cleared.
  vmi->dispatchQueued();
  while (!clears.empty()) {
    const auto [event, freeRoutine] = clears.front();
    clears.erase(clears.begin());
    vmi_clear_event(vmi, event, freeRoutine);
  }
  return vmi_resume_vm(vmi);
}

void releaseDeferred(vmi_instance_t vmi) {
  for (const auto &[event, freeRoutine] : vmi->events.clears)
    if (freeRoutine != nullptr) freeRoutine(event, VMI_SUCCESS);
  vmi->events.clears.clear();
}

}  // namespace vmi

using namespace vmi;

uint32_t vmi_events_version(void) { return VMI_EVENTS_VERSION; }

status_t vmi_register_event(vmi_instance_t vmi, vmi_event_t *event) {
  if (vmi == nullptr || event == nullptr || !vmi->hasEvents()) return VMI_FAILURE;
  if (event->version != VMI_EVENTS_VERSION || event->callback == nullptr) return VMI_FAILURE;
  switch (event->type) {
    case VMI_EVENT_MEMORY:
      return event->mem_event.generic ? registerGeneric(vmi, event) : registerOnFrame(vmi, event);
    case VMI_EVENT_SINGLESTEP:
      return registerSingleStep(vmi, event);
    default:
      complain("events of type %u are not supported", event->type);
      return VMI_FAILURE;
  }
}

status_t vmi_clear_event(vmi_instance_t vmi, vmi_event_t *event, vmi_event_free_t free_routine) {
  if (vmi == nullptr || event == nullptr || !vmi->hasEvents()) return VMI_FAILURE;
  if (vmi->inCallback) {
    auto &clears = vmi->events.clears;
    const auto same = std::find_if(clears.begin(), clears.end(), [=](const auto &it) { return it.first == event; });
    if (same == clears.end()) {
      clears.emplace_back(event, free_routine);
      return VMI_SUCCESS;
    }
    // As in libvmi: asking twice is wrong only once somebody is to be told.
    if (same->second != nullptr) return VMI_FAILURE;
    same->second = free_routine;
    return VMI_SUCCESS;
  }
  status_t status = VMI_FAILURE;
  if (event->type == VMI_EVENT_MEMORY) status = clearMemory(vmi, event);
  if (event->type == VMI_EVENT_SINGLESTEP) status = clearSingleStep(vmi, event);
  if (free_routine != nullptr) free_routine(event, status);
  return status;
}

status_t vmi_set_mem_event(vmi_instance_t vmi, addr_t gfn, vmi_mem_access_t access, uint16_t slat_id) {
  if (vmi == nullptr || !vmi->hasEvents()) return VMI_FAILURE;
  const auto &generic = vmi->events.generic;
  const auto handles = [=](const auto &event) { return event.first & access; };
  if (access != VMI_MEMACCESS_N && std::none_of(generic.begin(), generic.end(), handles)) {
    complain("no generic event handles the access 0x%x", access);
    return VMI_FAILURE;
  }
  if (trap(vmi, gfn, access, slat_id) != VMI_SUCCESS) return VMI_FAILURE;
  noteFrame(vmi, gfn);
  return VMI_SUCCESS;
}

status_t vmi_step_event(vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu_id, uint64_t steps, event_callback_t cb) {
  if (vmi == nullptr || event == nullptr || !vmi->hasEvents() || steps == 0) return VMI_FAILURE;
  // libvmi takes one number too many for a vCPU's, and so does this; the callback never runs then.
  if (vcpu_id > vmi->vcpuCount || vcpu_id >= MAX_SINGLESTEP_VCPUS) return VMI_FAILURE;
  if (!startCounting(vmi, vcpu_id)) return VMI_FAILURE;
  vmi->events.countdowns.push_back({event, vcpu_id, steps, cb});
  return VMI_SUCCESS;
}

status_t vmi_toggle_single_step_vcpu(vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu, bool enabled) {
  if (vmi == nullptr || event == nullptr || !vmi->hasEvents() || vmi->inCallback) return VMI_FAILURE;
  if (vcpu >= MAX_SINGLESTEP_VCPUS) return VMI_FAILURE;
  auto &owners = vmi->events.singleStep;
  const uint32_t bit = uint32_t{1} << vcpu;
  if (!enabled) {
    event->ss_event.vcpus &= ~bit;
    return owners.erase(vcpu) > 0 ? controlSingleStep(vmi, vcpu, false) : VMI_FAILURE;
  }
  event->ss_event.vcpus |= bit;
  // Where there was an owner, this event takes its place, although the caller is told of a failure.
  return owners.insert_or_assign(vcpu, event).second ? startSingleSteps(vmi, event) : VMI_FAILURE;
}

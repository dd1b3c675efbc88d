#include "events.h"

#include <algorithm>

#include "dispatch.h"
#include "instance.h"
#include "log.h"

namespace kvmi {

vmi_event_t *EventTables::memoryEvent(addr_t gfn, vmi_mem_access_t access) const {
  const auto found = byFrame.find(gfn);
  if (found != byFrame.end() && (found->second->mem_event.in_access & access)) return found->second;
  for (vmi_event_t *event : generic)
    if (event->mem_event.in_access & access) return event;
  return nullptr;
}

namespace {

constexpr addr_t kEveryFrame = ~addr_t{0};
constexpr addr_t kMaxFrame = (addr_t{1} << 40) - 1;

bool selects(const vmi_event_t *event, uint32_t vcpu) {
  return vcpu < MAX_SINGLESTEP_VCPUS && (event->ss_event.vcpus >> vcpu & 1);
}

/** What KVM is to permit, for what the caller wants trapped. */
std::optional<uint8_t> permissions(vmi_mem_access_t trapped) {
  switch (trapped) {
    case VMI_MEMACCESS_N:
      return wire::kAccessAll;
    case VMI_MEMACCESS_W:
    case VMI_MEMACCESS_X:
    case VMI_MEMACCESS_RW:
    case VMI_MEMACCESS_WX:
    case VMI_MEMACCESS_RWX:
      return wire::kAccessAll & ~(trapped >> 1);
    case VMI_MEMACCESS_R:
    case VMI_MEMACCESS_RX:
      complain("trapping reads but not writes is unsupported by EPT: use VMI_MEMACCESS_RW");
      return std::nullopt;
    default:
      complain("0x%x is not an access that can be trapped", trapped);
      return std::nullopt;
  }
}

status_t trap(vmi_instance_t vmi, addr_t gfn, vmi_mem_access_t access, uint16_t view) {
  const auto permitted = permissions(access);
  if (!permitted || gfn > kMaxFrame) return VMI_FAILURE;
  wire::SetPageAccess command{};
  command.view = view;
  command.count = 1;
  wire::PageAccess page{};
  page.gpa = gfn << kPageShift;
  page.access = *permitted;
  return vmi->connection->request(wire::MessageId::kSetPageAccess, {command, page}) ? VMI_SUCCESS : VMI_FAILURE;
}

status_t registerGeneric(vmi_instance_t vmi, vmi_event_t *event) {
  EventTables &events = vmi->events;
  if (event->mem_event.gfn != kEveryFrame || !events.byFrame.empty()) return VMI_FAILURE;
  for (const vmi_event_t *other : events.generic)
    if (other->mem_event.in_access == event->mem_event.in_access) return VMI_FAILURE;
  events.generic.push_back(event);
  return VMI_SUCCESS;
}

status_t registerOnFrame(vmi_instance_t vmi, vmi_event_t *event) {
  EventTables &events = vmi->events;
  const addr_t gfn = event->mem_event.gfn;
  if (!events.generic.empty() || events.byFrame.count(gfn) > 0) return VMI_FAILURE;
  if (trap(vmi, gfn, event->mem_event.in_access, event->slat_id) != VMI_SUCCESS) return VMI_FAILURE;
  events.byFrame.emplace(gfn, event);
  return VMI_SUCCESS;
}

status_t registerSingleStep(vmi_instance_t vmi, vmi_event_t *event) {
  auto &owners = vmi->events.singleStep;
  if (event->ss_event.vcpus == 0) return VMI_FAILURE;
  for (uint32_t vcpu = 0; vcpu < owners.size(); vcpu++)
    if (selects(event, vcpu) && owners[vcpu] != nullptr) return VMI_FAILURE;
  for (uint32_t vcpu = 0; vcpu < owners.size(); vcpu++) {
    if (!selects(event, vcpu) || !event->ss_event.enable) continue;
    if (controlSingleStep(vmi, vcpu, true) != VMI_SUCCESS) {
      for (uint32_t started = 0; started < vcpu; started++)
        if (selects(event, started)) controlSingleStep(vmi, started, false);
      return VMI_FAILURE;
    }
  }
  for (uint32_t vcpu = 0; vcpu < owners.size(); vcpu++)
    if (selects(event, vcpu)) owners[vcpu] = event;
  return VMI_SUCCESS;
}

status_t clearMemory(vmi_instance_t vmi, vmi_event_t *event) {
  EventTables &events = vmi->events;
  if (event->mem_event.generic) {
    events.generic.erase(std::remove(events.generic.begin(), events.generic.end(), event), events.generic.end());
    return VMI_SUCCESS;
  }
  const status_t status = trap(vmi, event->mem_event.gfn, VMI_MEMACCESS_N, event->slat_id);
  if (status == VMI_SUCCESS) events.byFrame.erase(event->mem_event.gfn);
  return status;
}

status_t clearSingleStep(vmi_instance_t vmi, vmi_event_t *event) {
  auto &owners = vmi->events.singleStep;
  status_t status = VMI_FAILURE;
  for (uint32_t vcpu = 0; vcpu < owners.size(); vcpu++) {
    if (!selects(event, vcpu)) continue;
    status = controlSingleStep(vmi, vcpu, false);
    if (status == VMI_SUCCESS) owners[vcpu] = nullptr;
  }
  return status;
}

}  // namespace

status_t controlSingleStep(vmi_instance_t vmi, uint32_t vcpu, bool enable) {
  wire::VcpuHeader header{};
  header.vcpu = static_cast<uint16_t>(vcpu);
  wire::ControlSingleStep command{};
  command.enable = enable;
  if (!vmi->connection->request(wire::MessageId::kControlSingleStep, {header, command})) return VMI_FAILURE;
  vmi->vcpus[vcpu].singleStepping = enable;
  return VMI_SUCCESS;
}

bool countStep(vmi_instance_t vmi, uint32_t vcpu) {
  auto &countdowns = vmi->events.countdowns;
  std::vector<EventTables::Countdown> finished;
  bool counted = false;
  for (auto &countdown : countdowns) {
    if (countdown.vcpu != vcpu) continue;
    counted = true;
    if (--countdown.steps == 0) finished.push_back(countdown);
  }
  if (!counted) return false;
  const auto isDone = [](const auto &countdown) { return countdown.steps == 0; };
  countdowns.erase(std::remove_if(countdowns.begin(), countdowns.end(), isDone), countdowns.end());

  // These may ask for more steps.
  for (const auto &countdown : finished) {
    if (countdown.callback == nullptr) {
      vmi_register_event(vmi, countdown.event);
      continue;
    }
    vmi->inCallback = true;
    countdown.callback(vmi, countdown.event);
    vmi->inCallback = false;
  }
  const auto isHere = [vcpu](const auto &countdown) { return countdown.vcpu == vcpu; };
  if (std::none_of(countdowns.begin(), countdowns.end(), isHere)) controlSingleStep(vmi, vcpu, false);
  return true;
}

status_t clearDeferred(vmi_instance_t vmi) {
  auto &clears = vmi->events.clears;
  if (clears.empty()) return VMI_SUCCESS;
  if (vmi_pause_vm(vmi) != VMI_SUCCESS) return VMI_FAILURE;
  // All that was raised before the pause was on the wire before its reply, and may belong to an event to be cleared.
  dispatchQueued(vmi);
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

}  // namespace kvmi

using namespace kvmi;

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
  const auto handles = [=](const vmi_event_t *event) { return event->mem_event.in_access & access; };
  if (access != VMI_MEMACCESS_N && std::none_of(generic.begin(), generic.end(), handles)) {
    complain("no generic event handles the access 0x%x", access);
    return VMI_FAILURE;
  }
  return trap(vmi, gfn, access, slat_id);
}

status_t vmi_step_event(vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu_id, uint64_t steps, event_callback_t cb) {
  if (vmi == nullptr || event == nullptr || !vmi->hasEvents() || !vmi->hasVcpu(vcpu_id) || steps == 0)
    return VMI_FAILURE;
  if (vmi->events.singleStep[vcpu_id] != nullptr) return VMI_FAILURE;
  if (!vmi->vcpus[vcpu_id].singleStepping && controlSingleStep(vmi, vcpu_id, true) != VMI_SUCCESS) return VMI_FAILURE;
  vmi->events.countdowns.push_back({event, vcpu_id, steps, cb});
  return VMI_SUCCESS;
}

status_t vmi_toggle_single_step_vcpu(vmi_instance_t vmi, vmi_event_t *event, uint32_t vcpu, bool enabled) {
  if (vmi == nullptr || event == nullptr || !vmi->hasEvents() || vmi->inCallback) return VMI_FAILURE;
  if (!vmi->hasVcpu(vcpu) || vcpu >= MAX_SINGLESTEP_VCPUS) return VMI_FAILURE;
  vmi_event_t *&owner = vmi->events.singleStep[vcpu];
  if (enabled == (owner != nullptr)) return VMI_FAILURE;
  if (controlSingleStep(vmi, vcpu, enabled) != VMI_SUCCESS) return VMI_FAILURE;
  const uint32_t bit = uint32_t{1} << vcpu;
  event->ss_event.vcpus = enabled ? event->ss_event.vcpus | bit : event->ss_event.vcpus & ~bit;
  owner = enabled ? event : nullptr;
  return VMI_SUCCESS;
}

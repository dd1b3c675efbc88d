#include "monitor.h"

#include <poll.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "../vmi/log.h"

namespace xen {
namespace {

const char *whyRefused(int error) {
  switch (error) {
    case EBUSY:
      return "another tool watches this guest, or one that was killed left it watched (then restart the guest)";
    case ENODEV:
    case EOPNOTSUPP:
      return "Xen can watch only guests with hardware-assisted paging (EPT)";
    default:
      return strerror(error);
  }
}

}  // namespace

std::unique_ptr<Monitor> Monitor::enable(xc_interface *control, uint32_t domain) {
  const int version = xc_vm_event_get_version(control);
  if (version != VM_EVENT_INTERFACE_VERSION) {
    vmi::complain("Xen has version %d of its events, and this library was built for version %d", version,
                  VM_EVENT_INTERFACE_VERSION);
    return nullptr;
  }
  std::unique_ptr<Monitor> monitor(new Monitor(control, domain));
  uint32_t remotePort = 0;
  monitor->page_ = xc_monitor_enable(control, domain, &remotePort);
  if (monitor->page_ == nullptr) {
    vmi::complain("the guest cannot be watched: %s", whyRefused(errno));
    return nullptr;
  }
  auto *const shared = static_cast<vm_event_sring_t *>(monitor->page_);
  SHARED_RING_INIT(shared);
  BACK_RING_INIT(&monitor->ring_, shared, XC_PAGE_SIZE);
  monitor->channels_.reset(xenevtchn_open(nullptr, 0));
  if (monitor->channels_)
    monitor->port_ = xenevtchn_bind_interdomain(monitor->channels_.get(), domain, remotePort);
  if (monitor->port_ >= 0) return monitor;
  vmi::complain("the event channel of the guest cannot be opened: %s", strerror(errno));
  return nullptr;
}

Monitor::~Monitor() {
  if (port_ >= 0) xenevtchn_unbind(channels_.get(), port_);
  if (page_ == nullptr) return;
  // A guest that has gone took it along.
  xc_monitor_disable(control_, domain_);
  munmap(page_, XC_PAGE_SIZE);
}

bool Monitor::await(const vmi::Deadline &deadline) {
  while (pending() == 0) {
    pollfd channel{xenevtchn_fd(channels_.get()), POLLIN, 0};
    const int ready = poll(&channel, 1, deadline.remaining());
    if (ready == 0 || (ready < 0 && errno != EINTR)) return false;
    if (ready < 0) continue;
    const auto port = xenevtchn_pending(channels_.get());
    // Before the ring is looked at: what comes later rings again.
    if (port < 0 || xenevtchn_unmask(channels_.get(), port) != 0) return false;
  }
  return true;
}

unsigned Monitor::pending() const {
  // Never more than the ring holds, whatever its page says.
  return XEN_RING_NR_UNCONSUMED_REQUESTS(&ring_);
}

std::optional<Request> Monitor::next() {
  if (pending() == 0) return std::nullopt;
  xen_rmb();
  Request request;
  memcpy(&request, RING_GET_REQUEST(&ring_, ring_.req_cons), sizeof request);
  ring_.req_cons++;
  return request;
}

void Monitor::answer(const Response &response) {
  memcpy(RING_GET_RESPONSE(&ring_, ring_.rsp_prod_pvt), &response, sizeof response);
  ring_.rsp_prod_pvt++;
  RING_PUSH_RESPONSES(&ring_);
  answered_ = true;
}

void Monitor::deliver() {
  if (!answered_) return;
  answered_ = false;
  xenevtchn_notify(channels_.get(), port_);
}

}  // namespace xen

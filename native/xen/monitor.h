#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "../vmi/deadline.h"
#include "handles.h"
#include "libxen.h"

namespace xen {

using Request = vm_event_request_t;
using Response = vm_event_response_t;

/** The ring on which Xen reports what a domain's vCPUs raise. A vCPU stands still until its request is answered. */
class Monitor {
 public:
  /** Null, with a complaint, where Xen refuses. */
  static std::unique_ptr<Monitor> enable(xc_interface *control, uint32_t domain);

  /** Switches the reports off. Every request has to be answered by then: nobody else can let its vCPU go on. */
  ~Monitor();

  /** Waits for requests; false if none has come. */
  bool await(const vmi::Deadline &deadline);
  /** Requests that have come and were not taken. */
  unsigned pending() const;
  std::optional<Request> next();

  /** Puts an answer on the ring; there is room for one to each request. */
  void answer(const Response &response);
  /** Has Xen carry the answers out. */
  void deliver();

 private:
  Monitor(xc_interface *control, uint32_t domain) : control_(control), domain_(domain) {}

  xc_interface *control_;
  uint32_t domain_;
  EventChannels channels_;
  int port_ = -1;
  void *page_ = nullptr;
  vm_event_back_ring_t ring_{};
  bool answered_ = false;
};

}  // namespace xen

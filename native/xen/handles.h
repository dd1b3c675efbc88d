#pragma once

#include <memory>

#include "libxen.h"

namespace xen {

struct CloseControl {
  void operator()(xc_interface *handle) const { xc_interface_close(handle); }
};
struct CloseEventChannels {
  void operator()(xenevtchn_handle *handle) const { xenevtchn_close(handle); }
};
struct CloseForeignMemory {
  void operator()(xenforeignmemory_handle *handle) const { xenforeignmemory_close(handle); }
};

using Control = std::unique_ptr<xc_interface, CloseControl>;
using EventChannels = std::unique_ptr<xenevtchn_handle, CloseEventChannels>;
using ForeignMemory = std::unique_ptr<xenforeignmemory_handle, CloseForeignMemory>;

}  // namespace xen

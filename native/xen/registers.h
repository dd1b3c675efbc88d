#pragma once

#include <libvmi/libvmi.h>

#include "libxen.h"

namespace xen {

/** What an event tells of its vCPU; the rest stays zero, as in libvmi. */
x86_registers_t fromEvent(const vm_event_regs_x86 &from);

}  // namespace xen

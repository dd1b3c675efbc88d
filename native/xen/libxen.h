#pragma once

#include <cstddef>
#include <cstdint>

// Xen's headers are C, and all of them rely on the first.
extern "C" {
#include <xenctrl.h>

#include <xen/hvm/save.h>
#include <xen/vm_event.h>
#include <xenevtchn.h>
#include <xenforeignmemory.h>
#include <xenstore.h>
}

#pragma once

#include <libvmi/libvmi.h>

namespace vmi {

/** Reads from guest-physical memory, within one page. */
bool readWithinPage(vmi_instance_t vmi, addr_t pa, void *to, size_t size);

}  // namespace vmi

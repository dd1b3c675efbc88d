#pragma once

#include <libvmi/libvmi.h>

namespace vmi {

/** Translates by the page table at `root`, out of the cache if it is known there. Only four levels are known. */
bool translate(vmi_instance_t vmi, page_mode_t mode, addr_t root, addr_t va, addr_t &pa);

}  // namespace vmi

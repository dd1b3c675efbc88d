#pragma once

#include <libvmi/libvmi.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "events.h"
#include "page_cache.h"
#include "translation_cache.h"

/** One attached guest. What differs by hypervisor is virtual; the rest of the C interface is built on it. */
struct vmi_instance {
  virtual ~vmi_instance() = default;

  /** A page as memory holds it now; nothing if it cannot be read. */
  virtual std::optional<vmi::Page> fetchPage(addr_t gfn) = 0;
  /** Does not cross a page. How far memory reaches is left to the hypervisor. */
  virtual bool writeWithinPage(addr_t pa, const void *from, size_t size) = 0;
  /** Has these accesses to a frame reported, an EPT entry permitting; VMI_MEMACCESS_N gives it all permissions back. */
  virtual bool trap(addr_t gfn, vmi_mem_access_t accesses, uint16_t view) = 0;
  /** Before vCPUs are stepped, also by answers to events; false where the hypervisor cannot. */
  virtual bool prepareSingleSteps() = 0;
  virtual bool setSingleStep(uint32_t vcpu, bool enable) = 0;
  /** Handles what is queued. Of what is queued meanwhile it leaves some: a guest may raise events without end. */
  virtual void dispatchQueued() = 0;

  uint64_t initFlags = 0;
  unsigned vcpuCount = 0;
  addr_t maxPhysicalAddress = 0;
  page_mode_t pageMode = VMI_PM_UNKNOWN;
  bool transitionPages = false;
  unsigned pauseCount = 0;
  bool inCallback = false;
  vmi::EventTables events;
  vmi::PageCache pages;
  vmi::TranslationCache translations;

  bool hasEvents() const { return initFlags & VMI_INIT_EVENTS; }
  bool hasVcpu(unsigned long vcpu) const { return vcpu < vcpuCount; }
};

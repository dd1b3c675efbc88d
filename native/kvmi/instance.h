#pragma once

#include <libvmi/libvmi.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "connection.h"
#include "events.h"
#include "page_cache.h"
#include "translation_cache.h"

/** One attached guest. */
struct vmi_instance {
  struct Vcpu {
    /** The number of the event with which it reported that it stands still; resume answers it. */
    std::optional<uint32_t> pauseEvent;
    bool singleStepping = false;
  };

  uint64_t initFlags = 0;
  std::unique_ptr<kvmi::Connection> connection;
  std::vector<Vcpu> vcpus;
  addr_t maxPhysicalAddress = 0;
  page_mode_t pageMode = VMI_PM_UNKNOWN;
  bool transitionPages = false;
  unsigned pauseCount = 0;
  bool inCallback = false;
  bool shuttingDown = false;
  /** Responses that KVM cannot carry out and that were complained about already. */
  event_response_t complainedResponses = 0;
  kvmi::EventTables events;
  kvmi::PageCache pages;
  kvmi::TranslationCache translations;

  bool hasEvents() const { return initFlags & VMI_INIT_EVENTS; }
  bool hasVcpu(unsigned long vcpu) const { return vcpu < vcpus.size(); }
};

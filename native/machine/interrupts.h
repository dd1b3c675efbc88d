// Delivery of interrupts and exceptions to the guest; the engine has no way to inject them.
#pragma once

#include <cstdint>
#include <optional>

#include "vcpu.h"

namespace memtables {

struct Event {
  enum Source { kExternal, kSoftware, kException } source;
  uint32_t vector;
  uint32_t errorCode = 0;
};

constexpr uint32_t kVectorDebug = 1;
constexpr uint32_t kVectorInvalidOpcode = 6;
constexpr uint32_t kVectorGeneralProtection = 13;
constexpr uint32_t kVectorPageFault = 14;

/**
 * Takes the vCPU to its handler for `event`. What goes wrong on the way becomes another event.
 * @throws MachineError on a triple fault
 */
void deliver(Vcpu& vcpu, Event event);

/** Sets CR2 and delivers the #PF. */
void deliverPageFault(Vcpu& vcpu, uint64_t gva, uint32_t errorCode);

/** Turns the stop of kind `kException` into what the guest sees. True if INT n or INT3 raised it: it has retired. */
bool deliverRaised(Vcpu& vcpu, const Stop& stop);

/** Right after STI or MOV SS. */
bool inInterruptShadow(Vcpu& vcpu);

/** The highest pending vector that the vCPU may take now. */
std::optional<uint32_t> acceptable(Vcpu& vcpu);

/** Takes the highest acceptable vector, if there is one; wakes a halted vCPU. Returns whether it did. */
bool takeInterrupt(Vcpu& vcpu);

/** Carries out SYSCALL, whose instruction has retired without any effect but RIP. */
void enterSystemCall(Vcpu& vcpu);

}  // namespace memtables

// Reads and writes of guest-virtual memory on the CPU's behalf, as its microcode would make them: supervisor
// rights, no regard to the frames' rights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "vcpu.h"

namespace memtables {

/** A page fault met on the way. */
struct AccessFault {
  uint64_t gva;
  uint32_t errorCode;
};

std::optional<AccessFault> readAsCpu(Vcpu& vcpu, uint64_t gva, void* bytes, size_t length);
std::optional<AccessFault> writeAsCpu(Vcpu& vcpu, uint64_t gva, const void* bytes, size_t length);

/** The bytes of the instruction at `gva`, up to `limit`, fewer where no code is mapped. Leaves no marks. */
size_t fetchCode(const Vcpu& vcpu, uint64_t gva, uint8_t* bytes, size_t limit);

constexpr size_t kLongestInstruction = 15;

}  // namespace memtables

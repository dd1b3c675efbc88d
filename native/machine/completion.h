// A trapped instruction: decoded at the trap, carried out when all its denied pieces have been answered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "guest_access.h"
#include "vcpu.h"

namespace memtables {

/** One piece of the instruction's accesses, let through; `data` replaces what it reads unless it is empty. */
struct Answer {
  uint64_t gva;
  /** GPA of its frame. */
  uint64_t frame;
  Access access;
  std::vector<uint8_t> data;
};

struct OpenInstruction {
  uint8_t bytes[kLongestInstruction] = {};
  size_t length = 0;
  std::vector<Answer> answers;
};

/**
 * One attempt to carry the instruction out. Whatever is in memory at RIP now, the vCPU executes `bytes`. A
 * stop of kind `kDenied` means that a further piece wants an answer; nothing has happened then.
 */
Stop carryOut(Vcpu& vcpu, const OpenInstruction& instruction);

}  // namespace memtables

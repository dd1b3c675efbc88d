// The guest's own page tables: four levels, 4 KB, 2 MB and 1 GB pages.
#pragma once

#include <cstdint>

#include "memory.h"

namespace memtables {

/** The registers that decide how an address is translated. */
struct PagingState {
  uint64_t cr0 = 0;
  uint64_t cr3 = 0;
  uint64_t cr4 = 0;
  uint64_t efer = 0;
  uint64_t rflags = 0;
  bool user = false;
};

struct Translation {
  enum Outcome { kMapped, kPageFault, kNonCanonical } outcome;
  /** GPA of the 4 KB frame. */
  uint64_t frame = 0;
  /** What the guest's tables allow; without a dirty bit no write is allowed except by the write itself. */
  uint8_t rights = 0;
  /** Of the page fault. */
  uint32_t errorCode = 0;
};

/** Whether the walk leaves accessed and dirty bits behind, as the CPU's own does. */
enum class Marks { kSet, kNone };

Translation walk(const GuestMemory& memory, const PagingState& state, uint64_t gva, Access access,
                 Marks marks);

}  // namespace memtables

// What the vCPUs share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "memory.h"

namespace memtables {

class Vcpu;

class Board {
 public:
  explicit Board(uint64_t memoryBytes) : memory(memoryBytes) {}

  /** To be called after every write that is not the vCPU's own store; makes all forget the frame's old code. */
  void codeChanged(uint64_t gpa);
  /** Takes write access to the frame from every vCPU, before one of them translates it. */
  void revokeWrites(uint64_t gpa);
  /** The vCPU is going to translate the frame by a way of its own. */
  void claimForCode(uint64_t gpa, const Vcpu& vcpu);
  /** Makes every vCPU look again at what it may access. */
  void permissionsChanged();

  /** Nanoseconds of running time; what RDTSC counts. */
  uint64_t clock() const;

  GuestMemory memory;
  std::vector<Vcpu*> vcpus;
  std::string console;
  /** Running time before the current `run`, and when that began (0: not running). */
  uint64_t clockBase = 0;
  uint64_t runStarted = 0;
};

/** Monotonic wall-clock time in nanoseconds. */
uint64_t now();

}  // namespace memtables

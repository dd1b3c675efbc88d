#include "board.h"

#include <time.h>

#include "vcpu.h"

namespace memtables {

void Board::codeChanged(uint64_t gpa) {
  Frame& frame = memory.frame(gpa);
  for (Vcpu* vcpu : vcpus) {
    if ((frame.translatedBy >> vcpu->index()) & 1) vcpu->forgetCode(pageOf(gpa));
  }
  frame.translatedBy = 0;
}

void Board::revokeWrites(uint64_t gpa) {
  Frame& frame = memory.frame(gpa);
  for (Vcpu* vcpu : vcpus) {
    if ((frame.writableBy >> vcpu->index()) & 1) vcpu->forgetTranslations();
  }
  frame.writableBy = 0;
}

void Board::claimForCode(uint64_t gpa, const Vcpu& vcpu) {
  revokeWrites(gpa);
  memory.frame(gpa).translatedBy |= 1u << vcpu.index();
}

void Board::permissionsChanged() {
  for (Vcpu* vcpu : vcpus) vcpu->forgetTranslations();
}

uint64_t Board::clock() const { return clockBase + (runStarted == 0 ? 0 : now() - runStarted); }

uint64_t now() {
  constexpr uint64_t kNanosecondsPerSecond = 1000000000;
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<uint64_t>(time.tv_sec) * kNanosecondsPerSecond + static_cast<uint64_t>(time.tv_nsec);
}

}  // namespace memtables

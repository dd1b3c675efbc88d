// Guest-physical memory, and what each frame may be used for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace memtables {

constexpr unsigned kPageShift = 12;
constexpr uint64_t kPageSize = 1ull << kPageShift;
constexpr uint64_t kOffsetMask = kPageSize - 1;

constexpr uint64_t pageOf(uint64_t address) { return address & ~kOffsetMask; }
constexpr uint64_t offsetIn(uint64_t address) { return address & kOffsetMask; }

/** Bits of a permission; an access is exactly one of them. */
enum Access : uint8_t { kRead = 1, kWrite = 2, kExecute = 4 };
constexpr uint8_t kAllAccess = kRead | kWrite | kExecute;

/** Anonymous memory of the process, committed when it is touched. */
class HostMemory {
 public:
  explicit HostMemory(uint64_t bytes);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  uint8_t* data_;
  uint64_t size_;
};

/**
 * A frame. No engine notices that another one (or the host) writes to code it has translated, so a frame is
 * either translated or writable, never both; whoever needs the other one is stopped first.
 */
struct Frame {
  uint8_t rights = kAllAccess;
  /** vCPUs (a bit each) that may hold translations of this frame's code. */
  uint32_t translatedBy = 0;
  /** vCPUs whose TLB may let them write to this frame. */
  uint32_t writableBy = 0;
};

class GuestMemory {
 public:
  explicit GuestMemory(uint64_t bytes) : ram_(bytes), frames_(bytes >> kPageShift) {}

  uint64_t size() const { return ram_.size(); }
  uint8_t* at(uint64_t gpa) const { return ram_.data() + gpa; }
  bool contains(uint64_t gpa, uint64_t length) const {
    return gpa <= size() && length <= size() - gpa;
  }
  Frame& frame(uint64_t gpa) { return frames_[gpa >> kPageShift]; }

 private:
  HostMemory ram_;
  std::vector<Frame> frames_;
};

}  // namespace memtables

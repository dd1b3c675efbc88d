#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace vmi {

/** A point in time that a wait may not pass. */
class Deadline {
 public:
  explicit Deadline(uint32_t milliseconds) : end_(Clock::now() + std::chrono::milliseconds(milliseconds)) {}

  /** Milliseconds left, rounded up, 0 when it has passed: what poll() takes. */
  int remaining() const {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(end_ - Clock::now()).count();
    return static_cast<int>(std::clamp<int64_t>(left, 0, INT32_MAX));
  }

  bool passed() const { return Clock::now() >= end_; }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point end_;
};

}  // namespace vmi

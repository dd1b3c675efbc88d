// The machine: vCPUs that run in turn on the calling thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "board.h"
#include "completion.h"
#include "vcpu.h"

namespace memtables {

constexpr unsigned kMostVcpus = 32;

/** What a vCPU stopped for; the caller has to act before it runs again. */
struct Report {
  enum Kind {
    kGuestFault,  // the guest's tables refuse: `raisePageFault` with the exact address
    kDenied,      // the frame's rights refuse: `answer` all pieces on the page, then `complete`
    kSingleStep   // `complete`
  } kind;
  unsigned vcpu;
  Stop stop;
};

class Machine {
 public:
  Machine(unsigned vcpus, uint64_t memoryBytes);
  ~Machine();

  Board& board() { return board_; }
  Vcpu& vcpu(unsigned index) { return *vcpus_[index]; }
  unsigned vcpuCount() const { return static_cast<unsigned>(vcpus_.size()); }
  /** The bytes at RIP when the vCPU stopped. */
  OpenInstruction& open(unsigned index) { return open_[index]; }

  void writePhysical(uint64_t gpa, const uint8_t* bytes, size_t length);
  void setAccess(uint64_t gpa, uint8_t rights);
  void setRegisters(unsigned vcpu, const RegisterFile& values, RegisterSet set);
  void setTimer(uint8_t vector, uint64_t nanoseconds);

  struct RunResult {
    std::optional<Report> report;
    bool idle = false;
  };
  /** Comes back early where `called`, asked after every turn of a vCPU, says that the thread is needed. */
  RunResult run(uint64_t nanoseconds, const std::function<bool()>& called);

  struct StepResult {
    std::optional<Report> report;
    uint64_t retired = 0;
  };
  StepResult step(unsigned vcpu, uint64_t instructions);

  /** Carries the open instruction out with the answers given; a report means that it is still open. */
  std::optional<Report> complete(unsigned vcpu);
  /** Gives the open instruction up; the vCPU goes on from RIP. */
  void retry(unsigned vcpu);
  /** Instead of the open instruction the guest gets a #PF for `gva`. */
  void raisePageFault(unsigned vcpu, uint64_t gva, uint32_t errorCode);

 private:
  struct Outcome {
    std::optional<Report> report;
    bool retired = false;
  };

  bool canRun(Vcpu& vcpu);
  std::optional<Report> runSlice(Vcpu& vcpu);
  Outcome stepOnce(Vcpu& vcpu);
  Outcome settle(Vcpu& vcpu, const Stop& stop, bool exact);
  Outcome report(Vcpu& vcpu, Report::Kind kind, const Stop& stop);
  void close(Vcpu& vcpu);
  void tick();

  Board board_;
  std::vector<std::unique_ptr<Vcpu>> vcpus_;
  std::vector<OpenInstruction> open_;
  unsigned nextVcpu_ = 0;
  uint8_t timerVector_ = 0;
  uint64_t timerPeriod_ = 0;
  uint64_t timerDue_ = 0;
};

}  // namespace memtables

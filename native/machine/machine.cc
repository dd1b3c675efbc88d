#include "machine.h"

#include <algorithm>
#include <cstring>

#include "error.h"
#include "interrupts.h"
#include "single_step.h"

namespace memtables {
namespace {

/** About 50 to 100 microseconds: how late a timer tick or another vCPU's turn may come. */
constexpr uint64_t kSliceBlocks = 5000;
/** A guest whose exception handlers do nothing but raise exceptions never retires an instruction. */
constexpr unsigned kMostExceptionsInARow = 1000;

}  // namespace

Machine::Machine(unsigned vcpus, uint64_t memoryBytes) : board_(memoryBytes), open_(vcpus) {
  for (unsigned index = 0; index < vcpus; index++) {
    vcpus_.push_back(std::make_unique<Vcpu>(board_, index));
    board_.vcpus.push_back(vcpus_.back().get());
  }
}

Machine::~Machine() = default;

void Machine::writePhysical(uint64_t gpa, const uint8_t* bytes, size_t length) {
  memcpy(board_.memory.at(gpa), bytes, length);
  for (uint64_t page = pageOf(gpa); page < gpa + length; page += kPageSize) board_.codeChanged(page);
}

void Machine::setAccess(uint64_t gpa, uint8_t rights) {
  Frame& frame = board_.memory.frame(gpa);
  if (frame.rights == rights) return;
  frame.rights = rights;
  board_.permissionsChanged();
}

void Machine::setRegisters(unsigned index, const RegisterFile& values, RegisterSet set) {
  Vcpu& target = vcpu(index);
  if (target.trapped) {
    for (unsigned at = 0; at < kRegisterCount; at++) {
      if ((set >> at) & 1) target.deferred[at] = values[at];
    }
    target.deferredSet |= set;
    return;
  }
  const uint64_t rip = readRegister(target.engine(), UC_X86_REG_RIP);
  writeRegisters(target.engine(), values, set);
  constexpr RegisterSet kPaging = 1u << kCr0 | 1u << kCr3 | 1u << kCr4 | 1u << kEfer;
  if (set & kPaging) target.forgetTranslations();
  if ((set & (1u << kRip)) && values[kRip] != rip) target.halted = false;
}

void Machine::setTimer(uint8_t vector, uint64_t nanoseconds) {
  timerVector_ = vector;
  timerPeriod_ = nanoseconds;
  timerDue_ = now() + nanoseconds;
}

void Machine::tick() {
  if (timerPeriod_ == 0) return;
  const uint64_t time = now();
  if (time < timerDue_) return;
  timerDue_ = std::max(timerDue_ + timerPeriod_, time);
  for (auto& vcpu : vcpus_) vcpu->pending.set(timerVector_);
}

bool Machine::canRun(Vcpu& vcpu) {
  if (vcpu.pauses != 0 || vcpu.trapped) return false;
  return !vcpu.halted || acceptable(vcpu);
}

Machine::Outcome Machine::report(Vcpu& vcpu, Report::Kind kind, const Stop& stop) {
  vcpu.trapped = true;
  OpenInstruction& open = open_[vcpu.index()];
  open.answers.clear();
  open.length = fetchCode(vcpu, readRegister(vcpu.engine(), UC_X86_REG_RIP), open.bytes, sizeof open.bytes);
  return {Report{kind, vcpu.index(), stop}, kind == Report::kSingleStep};
}

/** `exact`: the stop came from a single step, so that its RIP is the instruction's own. */
Machine::Outcome Machine::settle(Vcpu& vcpu, const Stop& stop, bool exact) {
  switch (stop.kind) {
    case StopKind::kSliceEnd:
      return {};
    case StopKind::kRetired:
      return {std::nullopt, true};
    case StopKind::kHalted:
      vcpu.halted = true;
      return {std::nullopt, true};
    case StopKind::kSystemCall:
      enterSystemCall(vcpu);
      return {std::nullopt, true};
    case StopKind::kException:
      return {std::nullopt, deliverRaised(vcpu, stop)};
    case StopKind::kNonCanonical:
      deliver(vcpu, {Event::kException, kVectorGeneralProtection});
      return {};
    case StopKind::kWriteToCode:
      return settle(vcpu, stepInstruction(vcpu), true);
    case StopKind::kExecuteWritten:
      board_.revokeWrites(stop.frame);
      return {};
    case StopKind::kGuestFault:
    case StopKind::kDenied: {
      // The engine translates ahead: it may stop at a page that the instruction at RIP does not reach.
      const bool ahead =
          stop.access == kExecute && stop.page != pageOf(readRegister(vcpu.engine(), UC_X86_REG_RIP));
      if (ahead && !exact) return settle(vcpu, stepInstruction(vcpu), true);
      return report(vcpu, stop.kind == StopKind::kDenied ? Report::kDenied : Report::kGuestFault, stop);
    }
  }
  return {};
}

Machine::Outcome Machine::stepOnce(Vcpu& vcpu) { return settle(vcpu, stepInstruction(vcpu), true); }

std::optional<Report> Machine::runSlice(Vcpu& vcpu) {
  for (uint64_t blocks = kSliceBlocks; blocks > 0; blocks--) {
    takeInterrupt(vcpu);
    if (vcpu.halted) return std::nullopt;
    Outcome outcome;
    if (vcpu.singleStep) {
      outcome = stepOnce(vcpu);
      if (outcome.retired && !outcome.report) outcome = report(vcpu, Report::kSingleStep, Stop{});
    } else if (vcpu.pending.any() && inInterruptShadow(vcpu)) {
      outcome = stepOnce(vcpu);
    } else {
      outcome = settle(vcpu, vcpu.run(blocks), false);
    }
    if (outcome.report) return outcome.report;
    if (blocks == 0) break;
  }
  return std::nullopt;
}

Machine::RunResult Machine::run(uint64_t nanoseconds, const std::function<bool()>& called) {
  const uint64_t started = now();
  board_.runStarted = started;
  const auto finish = [&](RunResult result) {
    board_.clockBase = board_.clock();
    board_.runStarted = 0;
    return result;
  };
  try {
    for (;;) {
      bool idle = true;
      for (unsigned turn = 0; turn < vcpuCount(); turn++) {
        tick();
        Vcpu& current = vcpu(nextVcpu_);
        nextVcpu_ = (nextVcpu_ + 1) % vcpuCount();
        if (!canRun(current)) continue;
        idle = false;
        if (auto report = runSlice(current)) return finish({report, false});
        if (now() - started >= nanoseconds || called()) return finish({});
      }
      if (idle) return finish({std::nullopt, true});
    }
  } catch (...) {
    finish({});
    throw;
  }
}

Machine::StepResult Machine::step(unsigned index, uint64_t instructions) {
  Vcpu& current = vcpu(index);
  StepResult result;
  unsigned exceptions = 0;
  while (result.retired < instructions && canRun(current)) {
    takeInterrupt(current);
    const Outcome outcome = stepOnce(current);
    if (outcome.retired) {
      result.retired++;
      board_.clockBase++;
      exceptions = 0;
    } else if (++exceptions > kMostExceptionsInARow) {
      throw MachineError("the guest raises exceptions without end", static_cast<int>(index));
    }
    result.report = outcome.report;
    if (!result.report && outcome.retired && current.singleStep) {
      result.report = report(current, Report::kSingleStep, Stop{}).report;
    }
    if (result.report) break;
  }
  return result;
}

void Machine::close(Vcpu& vcpu) {
  vcpu.trapped = false;
  if (vcpu.deferredSet == 0) return;
  const RegisterSet set = vcpu.deferredSet;
  vcpu.deferredSet = 0;
  setRegisters(vcpu.index(), vcpu.deferred, set);
}

std::optional<Report> Machine::complete(unsigned index) {
  Vcpu& current = vcpu(index);
  const OpenInstruction instruction = open_[index];
  if (instruction.answers.empty()) {
    retry(index);
    return std::nullopt;
  }
  const Outcome outcome = settle(current, carryOut(current, instruction), true);
  if (outcome.report) {
    open_[index] = instruction;
    return outcome.report;
  }
  close(current);
  if (current.singleStep && outcome.retired) return report(current, Report::kSingleStep, Stop{}).report;
  return std::nullopt;
}

void Machine::retry(unsigned index) { close(vcpu(index)); }

void Machine::raisePageFault(unsigned index, uint64_t gva, uint32_t errorCode) {
  deliverPageFault(vcpu(index), gva, errorCode);
  close(vcpu(index));
}

}  // namespace memtables

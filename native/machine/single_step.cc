#include "single_step.h"

#include <vector>

#include "guest_access.h"
#include "interrupts.h"

namespace memtables {
namespace {

/** DR6.BS */
constexpr uint64_t kDebugStatusStep = 1ull << 14;

/** Instructions that store, load or look at RFLAGS.TF themselves. */
enum class Kind { kPlain, kPushFlags, kLoadFlags, kSystemReturn, kPause, kInterruptOne };

bool isLegacyPrefix(uint8_t byte) {
  switch (byte) {
    case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65:  // segments
    case 0x66: case 0x67: case 0xf0: case 0xf2: case 0xf3:
      return true;
    default:
      return false;
  }
}

struct Classified {
  Kind kind;
  size_t length;
};

Classified classify(const uint8_t* bytes, size_t length) {
  size_t at = 0;
  bool repeat = false;
  while (at < length && isLegacyPrefix(bytes[at])) repeat = bytes[at++] == 0xf3 || repeat;
  bool rexB = false;
  if (at < length && (bytes[at] & 0xf0) == 0x40) rexB = bytes[at++] & 1;
  const auto byte = [&](size_t offset) { return at + offset < length ? bytes[at + offset] : 0; };
  switch (byte(0)) {
    case 0x9c:
      return {Kind::kPushFlags, at + 1};
    case 0x9d:  // POPF
    case 0xcf:  // IRET
      return {Kind::kLoadFlags, at + 1};
    case 0x90:
      return {repeat && !rexB ? Kind::kPause : Kind::kPlain, at + 1};
    case 0xcd:
      return {byte(1) == kVectorDebug ? Kind::kInterruptOne : Kind::kPlain, at + 2};
    case 0x0f:
      return {byte(1) == 0x07 ? Kind::kSystemReturn : Kind::kPlain, at + 2};
    default:
      return {Kind::kPlain, 0};
  }
}

bool retired(const Stop& stop) { return stop.kind == StopKind::kRetired; }

/** In memory it is bit 0 of the second byte of the pushed flags. */
void clearPushedTrapFlag(Vcpu& vcpu) {
  const uint64_t at = readRegister(vcpu.engine(), UC_X86_REG_RSP) + 1;
  uint8_t byte = 0;
  constexpr uint8_t kTrapBit = 1;
  if (readAsCpu(vcpu, at, &byte, sizeof byte)) return;
  byte &= static_cast<uint8_t>(~kTrapBit);
  writeAsCpu(vcpu, at, &byte, sizeof byte);
}

Stop attemptStep(Vcpu& vcpu, const uint8_t* bytes, size_t length) {
  uc_engine* engine = vcpu.engine();
  const auto [kind, instructionLength] = classify(bytes, length);
  if (kind == Kind::kPause) {
    // The engine leaves a PAUSE in a way that would lose the trap.
    writeRegister(engine, UC_X86_REG_RIP, readRegister(engine, UC_X86_REG_RIP) + instructionLength);
    Stop stop;
    stop.kind = StopKind::kRetired;
    return stop;
  }

  const uint64_t guestTrapFlag = readRegister(engine, UC_X86_REG_RFLAGS) & kFlagTrap;
  uint64_t trapFlag = guestTrapFlag;
  const uint64_t debugStatus = readRegister(engine, UC_X86_REG_DR6);
  const uint64_t r11 = readRegister(engine, UC_X86_REG_R11);
  writeRegister(engine, UC_X86_REG_RFLAGS, readRegister(engine, UC_X86_REG_RFLAGS) | kFlagTrap);
  // SYSRET would load RFLAGS without TF from it, and run on.
  if (kind == Kind::kSystemReturn) writeRegister(engine, UC_X86_REG_R11, r11 | kFlagTrap);

  Stop stop = vcpu.runTrapFlag();

  if (kind == Kind::kSystemReturn) {
    writeRegister(engine, UC_X86_REG_R11, r11);
    if (retired(stop)) trapFlag = r11 & kFlagTrap;
  }
  const uint64_t flags = readRegister(engine, UC_X86_REG_RFLAGS);
  if (kind == Kind::kLoadFlags && retired(stop)) trapFlag = flags & kFlagTrap;
  if (kind == Kind::kPushFlags && retired(stop) && trapFlag == 0) clearPushedTrapFlag(vcpu);
  if ((flags & kFlagTrap) != trapFlag) {
    writeRegister(engine, UC_X86_REG_RFLAGS, (flags & ~kFlagTrap) | trapFlag);
  }
  if (readRegister(engine, UC_X86_REG_DR6) != debugStatus) {
    writeRegister(engine, UC_X86_REG_DR6, debugStatus);
  }
  if (retired(stop) && kind == Kind::kInterruptOne) {
    stop.kind = StopKind::kException;
    stop.vector = kVectorDebug;
  } else if (retired(stop) && guestTrapFlag != 0) {
    writeRegister(engine, UC_X86_REG_DR6, debugStatus | kDebugStatusStep);
    deliver(vcpu, {Event::kException, kVectorDebug});
  }
  if (stop.kind == StopKind::kSystemCall) {
    enterSystemCall(vcpu);
    stop.kind = StopKind::kRetired;
  }
  return stop;
}

}  // namespace

Stop stepInstruction(Vcpu& vcpu, const uint8_t* bytes, size_t length) {
  const size_t grants = vcpu.grants.size();
  std::vector<uint64_t> written;
  Stop stop;
  for (;;) {
    stop = attemptStep(vcpu, bytes, length);
    if (stop.kind == StopKind::kExecuteWritten) {
      vcpu.board().revokeWrites(stop.frame);
    } else if (stop.kind == StopKind::kWriteToCode) {
      vcpu.grants.push_back({stop.page, kWrite, stop.frame});
      written.push_back(stop.frame);
    } else {
      break;
    }
  }
  vcpu.grants.resize(grants);
  for (const uint64_t frame : written) vcpu.board().codeChanged(frame);
  if (!written.empty()) vcpu.forgetTranslations();
  return stop;
}

Stop stepInstruction(Vcpu& vcpu) {
  uint8_t bytes[kLongestInstruction];
  const size_t length =
      fetchCode(vcpu, readRegister(vcpu.engine(), UC_X86_REG_RIP), bytes, sizeof bytes);
  return stepInstruction(vcpu, bytes, length);
}

}  // namespace memtables

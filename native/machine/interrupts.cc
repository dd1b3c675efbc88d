#include "interrupts.h"

#include <cstring>

#include "error.h"
#include "guest_access.h"

namespace memtables {
namespace {

constexpr uint32_t kVectorDivide = 0;
constexpr uint32_t kVectorDoubleFault = 8;
constexpr uint32_t kVectorInvalidTss = 10;
constexpr uint32_t kVectorNotPresent = 11;
constexpr uint32_t kVectorAlignment = 17;
constexpr unsigned kVectors = 256;
/** A vector's priority class is its upper nibble. */
constexpr unsigned kPriorityShift = 4;

constexpr uint64_t kFlagResume = 1ull << 16;
constexpr uint64_t kFlagNested = 1ull << 14;
constexpr uint64_t kFlagVirtual8086 = 1ull << 17;
constexpr uint64_t kFlagAlwaysSet = 2;

constexpr uint64_t kSelectorPrivilege = 3;
constexpr uint64_t kSelectorIndex = 0xfff8;
/** In a selector error code: the descriptor is in the IDT; the event came from outside the program. */
constexpr uint32_t kErrorIdt = 2;
constexpr uint32_t kErrorExternal = 1;

constexpr uint64_t kTssRsp0 = 4;
constexpr uint64_t kTssIst1 = 36;
constexpr uint64_t kStackAlignment = 16;

bool contributory(uint32_t vector) { return vector == kVectorDivide || (vector >= 10 && vector <= 13); }

bool hasErrorCode(uint32_t vector) {
  return vector == kVectorDoubleFault || (vector >= kVectorInvalidTss && vector <= kVectorPageFault) ||
         vector == kVectorAlignment;
}

struct Gate {
  uint64_t low;
  uint64_t high;
  uint64_t target() const { return (low & 0xffff) | ((low >> 32) & 0xffff0000) | (high << 32); }
  uint64_t selector() const { return (low >> 16) & 0xffff; }
  unsigned ist() const { return (low >> 32) & 7; }
  unsigned type() const { return (low >> 40) & 0x1f; }
  unsigned privilege() const { return (low >> 45) & 3; }
  bool present() const { return (low >> 47) & 1; }
};
constexpr unsigned kInterruptGate = 0xe;
constexpr unsigned kTrapGate = 0xf;

struct CodeSegment {
  uint64_t descriptor;
  bool code() const { return ((descriptor >> 43) & 3) == 3; }
  bool conforming() const { return (descriptor >> 42) & 1; }
  unsigned privilege() const { return (descriptor >> 45) & 3; }
  bool present() const { return (descriptor >> 47) & 1; }
  bool longMode() const { return (descriptor >> 53) & 1; }
};

/** What went wrong while an event was delivered. */
struct Failure {
  uint32_t vector;
  uint32_t errorCode;
  uint64_t gva = 0;
};

Failure pageFault(const AccessFault& fault) { return {kVectorPageFault, fault.errorCode, fault.gva}; }

/** One attempt; nothing has changed when it fails. */
std::optional<Failure> attempt(Vcpu& vcpu, const Event& event) {
  uc_engine* engine = vcpu.engine();
  const uint32_t external = event.source == Event::kSoftware ? 0 : kErrorExternal;
  const uint32_t gateError = event.vector * 8 + kErrorIdt + external;

  const auto idt = readTable(engine, UC_X86_REG_IDTR);
  Gate gate{};
  const uint64_t gateOffset = event.vector * sizeof gate;
  if (gateOffset + sizeof gate - 1 > idt.limit) return Failure{kVectorGeneralProtection, gateError};
  if (auto fault = readAsCpu(vcpu, idt.base + gateOffset, &gate, sizeof gate)) return pageFault(*fault);

  const unsigned privilege = readRegister(engine, UC_X86_REG_CS) & kSelectorPrivilege;
  if (gate.type() != kInterruptGate && gate.type() != kTrapGate) {
    return Failure{kVectorGeneralProtection, gateError};
  }
  if (event.source == Event::kSoftware && gate.privilege() < privilege) {
    return Failure{kVectorGeneralProtection, gateError};
  }
  if (!gate.present()) return Failure{kVectorNotPresent, gateError};

  const uint64_t selector = gate.selector() & kSelectorIndex;
  const auto selectorError = static_cast<uint32_t>(selector) + external;
  const auto gdt = readTable(engine, UC_X86_REG_GDTR);
  CodeSegment segment{};
  if (selector == 0 || selector + sizeof segment - 1 > gdt.limit) {
    return Failure{kVectorGeneralProtection, selectorError};
  }
  if (auto fault = readAsCpu(vcpu, gdt.base + selector, &segment, sizeof segment)) return pageFault(*fault);
  if (!segment.code() || !segment.longMode() || segment.privilege() > privilege) {
    return Failure{kVectorGeneralProtection, selectorError};
  }
  if (!segment.present()) return Failure{kVectorNotPresent, selectorError};

  const unsigned newPrivilege = segment.conforming() ? privilege : segment.privilege();
  const uint64_t oldStack = readRegister(engine, UC_X86_REG_RSP);
  const uint64_t oldStackSegment = readRegister(engine, UC_X86_REG_SS);
  uint64_t stack = oldStack;
  if (gate.ist() != 0 || newPrivilege != privilege) {
    const uint64_t slot = gate.ist() != 0 ? kTssIst1 + 8 * (gate.ist() - 1) : kTssRsp0 + 8 * newPrivilege;
    const auto tss = readTable(engine, UC_X86_REG_TR);
    if (slot + sizeof stack - 1 > tss.limit) return Failure{kVectorInvalidTss, external};
    if (auto fault = readAsCpu(vcpu, tss.base + slot, &stack, sizeof stack)) return pageFault(*fault);
  }
  stack &= ~(kStackAlignment - 1);

  const uint64_t flags = readRegister(engine, UC_X86_REG_RFLAGS);
  const uint64_t frame[] = {event.errorCode,
                            readRegister(engine, UC_X86_REG_RIP),
                            readRegister(engine, UC_X86_REG_CS),
                            flags,
                            oldStack,
                            oldStackSegment};
  const bool withError = event.source == Event::kException && hasErrorCode(event.vector);
  const uint64_t* bottom = withError ? frame : frame + 1;
  const size_t size = sizeof frame - (withError ? 0 : sizeof frame[0]);
  stack -= size;
  if (auto fault = writeAsCpu(vcpu, stack, bottom, size)) return pageFault(*fault);

  uint64_t newFlags = flags & ~(kFlagTrap | kFlagNested | kFlagResume | kFlagVirtual8086);
  if (gate.type() == kInterruptGate) newFlags &= ~kFlagInterrupt;
  writeRegister(engine, UC_X86_REG_RSP, stack);
  writeRegister(engine, UC_X86_REG_RIP, gate.target());
  writeRegister(engine, UC_X86_REG_CS, selector | newPrivilege);
  if (newPrivilege != privilege) writeRegister(engine, UC_X86_REG_SS, newPrivilege);
  writeRegister(engine, UC_X86_REG_RFLAGS, newFlags);

  HiddenState& hidden = vcpu.hidden();
  hidden.load();
  hidden.setPrivilegeLevel(newPrivilege);
  hidden.clearInterruptShadow();
  hidden.forgetException();
  hidden.store();
  return std::nullopt;
}

/** Of the INT3 or INT n that RIP stands behind. */
uint64_t softwareInterruptLength(Vcpu& vcpu, uint32_t vector) {
  constexpr uint32_t kBreakpoint = 3;
  constexpr uint8_t kInt3 = 0xcc;
  constexpr uint64_t kIntLength = 2;
  uint8_t last = 0;
  if (vector != kBreakpoint || fetchCode(vcpu, readRegister(vcpu.engine(), UC_X86_REG_RIP) - 1, &last, 1) == 0) {
    return kIntLength;
  }
  return last == kInt3 ? 1 : kIntLength;
}

}  // namespace

void deliver(Vcpu& vcpu, Event event) {
  for (;;) {
    const auto failure = attempt(vcpu, event);
    if (!failure) return;
    const bool first = event.source == Event::kException;
    if (first && event.vector == kVectorDoubleFault) {
      throw MachineError("triple fault", static_cast<int>(vcpu.index()));
    }
    if (event.source == Event::kSoftware) {
      // What comes instead is a fault: it stands at the instruction, which has not happened.
      writeRegister(vcpu.engine(), UC_X86_REG_RIP,
                    readRegister(vcpu.engine(), UC_X86_REG_RIP) - softwareInterruptLength(vcpu, event.vector));
    }
    if (failure->vector == kVectorPageFault) writeRegister(vcpu.engine(), UC_X86_REG_CR2, failure->gva);
    const bool second = contributory(failure->vector) || failure->vector == kVectorPageFault;
    const bool together = (contributory(event.vector) && contributory(failure->vector)) ||
                          (event.vector == kVectorPageFault && second);
    if (first && together) {
      event = {Event::kException, kVectorDoubleFault, 0};
    } else {
      event = {Event::kException, failure->vector, failure->errorCode};
    }
  }
}

void deliverPageFault(Vcpu& vcpu, uint64_t gva, uint32_t errorCode) {
  writeRegister(vcpu.engine(), UC_X86_REG_CR2, gva);
  deliver(vcpu, {Event::kException, kVectorPageFault, errorCode});
}

bool deliverRaised(Vcpu& vcpu, const Stop& stop) {
  HiddenState& hidden = vcpu.hidden();
  hidden.load();
  const bool software = hidden.softwareInterrupt();
  const uint32_t errorCode = hasErrorCode(stop.vector) ? hidden.errorCode() : 0;
  hidden.forgetException();
  hidden.store();
  if (software && stop.vector == kVectorInvalidOpcode) {
    // INT 6 arrives as an invalid instruction, which does not move RIP.
    constexpr uint64_t kLength = 2;
    writeRegister(vcpu.engine(), UC_X86_REG_RIP, readRegister(vcpu.engine(), UC_X86_REG_RIP) + kLength);
  }
  deliver(vcpu, {software ? Event::kSoftware : Event::kException, stop.vector, errorCode});
  return software;
}

bool inInterruptShadow(Vcpu& vcpu) {
  vcpu.hidden().load();
  return vcpu.hidden().interruptShadow();
}

std::optional<uint32_t> acceptable(Vcpu& vcpu) {
  if (vcpu.pending.none()) return std::nullopt;
  if (!(readRegister(vcpu.engine(), UC_X86_REG_RFLAGS) & kFlagInterrupt)) return std::nullopt;
  unsigned vector = kVectors - 1;
  while (!vcpu.pending[vector]) vector--;
  vcpu.hidden().load();
  if (vcpu.hidden().interruptShadow()) return std::nullopt;
  if (vector >> kPriorityShift <= vcpu.hidden().taskPriority()) return std::nullopt;
  return vector;
}

bool takeInterrupt(Vcpu& vcpu) {
  const auto vector = acceptable(vcpu);
  if (!vector) return false;
  vcpu.pending.reset(*vector);
  vcpu.halted = false;
  deliver(vcpu, {Event::kExternal, *vector});
  return true;
}

void enterSystemCall(Vcpu& vcpu) {
  constexpr uint64_t kSystemCallEnable = 1;
  constexpr unsigned kStarKernel = 32;
  constexpr uint64_t kKernelStackAfterCode = 8;
  uc_engine* engine = vcpu.engine();
  const uint64_t next = readRegister(engine, UC_X86_REG_RIP);
  constexpr uint64_t kInstructionLength = 2;
  if (!(readMsr(engine, kMsrEfer) & kSystemCallEnable)) {
    writeRegister(engine, UC_X86_REG_RIP, next - kInstructionLength);
    deliver(vcpu, {Event::kException, kVectorInvalidOpcode});
    return;
  }
  const uint64_t flags = readRegister(engine, UC_X86_REG_RFLAGS) & ~kFlagResume;
  const uint64_t selector = (readMsr(engine, kMsrStar) >> kStarKernel) & 0xfffc;
  writeRegister(engine, UC_X86_REG_RCX, next);
  writeRegister(engine, UC_X86_REG_R11, flags);
  writeRegister(engine, UC_X86_REG_RIP, readMsr(engine, kMsrLstar));
  writeRegister(engine, UC_X86_REG_RFLAGS, (flags & ~readMsr(engine, kMsrFmask)) | kFlagAlwaysSet);
  writeRegister(engine, UC_X86_REG_CS, selector);
  writeRegister(engine, UC_X86_REG_SS, selector + kKernelStackAfterCode);
  HiddenState& hidden = vcpu.hidden();
  hidden.load();
  hidden.setPrivilegeLevel(0);
  hidden.store();
}

}  // namespace memtables

// The machine as JavaScript sees it: src/machine/native.ts has the types. Every argument is checked here, since
// nothing behind this file does.
#include <napi.h>
#include <poll.h>
#include <uv.h>

#include <cstring>
#include <memory>
#include <string>

#include "error.h"
#include "machine.h"

namespace memtables {
namespace {

constexpr uint64_t kMostMemory = 64ull << 30;
constexpr uint32_t kMostReadBytes = 64u << 20;
constexpr double kMostMicroseconds = 3600e6;
constexpr uint64_t kNanosecondsPerMicrosecond = 1000;
/** Below are the exceptions, and an interrupt controller refuses them. */
constexpr uint64_t kLeastInterrupt = 16;
constexpr double kMostVector = 255;

[[noreturn]] void refuse(Napi::Env env, const std::string& message) {
  throw Napi::RangeError::New(env, message);
}

uint64_t integer(const Napi::CallbackInfo& info, size_t index, const char* name, double most) {
  const Napi::Value value = info[index];
  const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -1;
  if (!(number >= 0 && number <= most) || number != static_cast<double>(static_cast<uint64_t>(number))) {
    refuse(info.Env(), std::string(name) + " must be an integer from 0 to " +
                           std::to_string(static_cast<uint64_t>(most)));
  }
  return static_cast<uint64_t>(number);
}

uint64_t address(const Napi::CallbackInfo& info, size_t index, const char* name) {
  bool lossless = false;
  uint64_t value = 0;
  if (info[index].IsBigInt()) value = info[index].As<Napi::BigInt>().Uint64Value(&lossless);
  if (!lossless) refuse(info.Env(), std::string(name) + " must be a bigint of 64 bits, not negative");
  return value;
}

Napi::Uint8Array bytes(const Napi::CallbackInfo& info, size_t index, const char* name) {
  const Napi::Value value = info[index];
  if (value.IsTypedArray() && value.As<Napi::TypedArray>().TypedArrayType() == napi_uint8_array) {
    return value.As<Napi::Uint8Array>();
  }
  refuse(info.Env(), std::string(name) + " must be a Uint8Array");
}

Napi::BigUint64Array words(const Napi::CallbackInfo& info, size_t index, size_t length, const char* name) {
  const Napi::Value value = info[index];
  if (value.IsTypedArray() && value.As<Napi::TypedArray>().TypedArrayType() == napi_biguint64_array) {
    const auto array = value.As<Napi::BigUint64Array>();
    if (array.ElementLength() == length) return array;
  }
  refuse(info.Env(), std::string(name) + " must be a BigUint64Array of " + std::to_string(length));
}

Napi::BigUint64Array registerFile(const Napi::CallbackInfo& info, size_t index) {
  return words(info, index, kRegisterCount, "registers");
}

/** A report as 64-bit words, in the order of src/machine/report-block.ts; the registers come first. */
enum ReportWord : size_t {
  kReportKind = kRegisterCount,
  kReportVcpu,
  kReportAccess,
  kReportPage,
  kReportFrame,
  kReportErrorCode,
  kReportCodeLength,
  kReportCode,
  kReportWords = kReportCode + 2
};
static_assert(kLongestInstruction <= (kReportWords - kReportCode) * sizeof(uint64_t));
constexpr uint64_t kNoReport = ~0ull;

/** Whether something has come in for the thread's event loop: it watches one descriptor for all of its own. */
bool inputWaits(Napi::Env env) {
  uv_loop_t* loop = nullptr;
  if (napi_get_uv_event_loop(env, &loop) != napi_ok) return false;
  pollfd watched{uv_backend_fd(loop), POLLIN, 0};
  return poll(&watched, 1, 0) > 0;
}

class NativeMachine : public Napi::ObjectWrap<NativeMachine> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "NativeMachine",
                       {InstanceMethod<&NativeMachine::call<&NativeMachine::readPhysical>>("readPhysical"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::writePhysical>>("writePhysical"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::setAccess>>("setAccess"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::access>>("access"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::registers>>("registers"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::setRegisters>>("setRegisters"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::readMsr>>("readMsr"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::pause>>("pause"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::resume>>("resume"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::answer>>("answer"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::complete>>("complete"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::retry>>("retry"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::raisePageFault>>("raisePageFault"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::setSingleStep>>("setSingleStep"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::raiseInterrupt>>("raiseInterrupt"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::setTimer>>("setTimer"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::run>>("run"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::step>>("step"),
                        InstanceMethod<&NativeMachine::call<&NativeMachine::takeConsole>>("takeConsole"),
                        InstanceMethod<&NativeMachine::close>("close")});
  }

  explicit NativeMachine(const Napi::CallbackInfo& info) : Napi::ObjectWrap<NativeMachine>(info) {
    const auto vcpus = static_cast<unsigned>(integer(info, 0, "vcpus", kMostVcpus));
    const uint64_t memoryBytes = integer(info, 1, "memoryBytes", kMostMemory);
    if (vcpus == 0) refuse(info.Env(), "vcpus must be at least 1");
    if (memoryBytes == 0 || offsetIn(memoryBytes) != 0) {
      refuse(info.Env(), "memoryBytes must be a multiple of 4096, at least 4096");
    }
    try {
      machine_ = std::make_unique<Machine>(vcpus, memoryBytes);
    } catch (const std::exception& error) {
      throw Napi::Error::New(info.Env(), error.what());
    }
  }

 private:
  using Info = const Napi::CallbackInfo&;
  using Method = Napi::Value (NativeMachine::*)(Info);

  /** Refuses a closed machine, and turns what the machine throws into a JavaScript error. */
  template <Method method>
  Napi::Value call(Info info) {
    if (!machine_) throw Napi::Error::New(info.Env(), "the machine is closed");
    try {
      return (this->*method)(info);
    } catch (const MachineError& failure) {
      auto error = Napi::Error::New(info.Env(), failure.what());
      if (failure.vcpu >= 0) error.Set("vcpu", Napi::Number::New(info.Env(), failure.vcpu));
      throw error;
    } catch (const std::bad_alloc&) {
      throw Napi::Error::New(info.Env(), "out of memory");
    }
  }

  unsigned vcpuIndex(Info info) {
    return static_cast<unsigned>(integer(info, 0, "vcpu", machine_->vcpuCount() - 1));
  }
  Vcpu& vcpu(Info info) { return machine_->vcpu(vcpuIndex(info)); }

  unsigned trappedIndex(Info info) {
    const unsigned index = vcpuIndex(info);
    if (!machine_->vcpu(index).trapped) refuse(info.Env(), "the vCPU has no open trap");
    return index;
  }

  uint64_t interruptVector(Info info, size_t index) {
    const uint64_t vector = integer(info, index, "vector", kMostVector);
    if (vector < kLeastInterrupt) refuse(info.Env(), "vectors below 16 are exceptions, not interrupts");
    return vector;
  }

  uint64_t physical(Info info, uint64_t length) {
    const uint64_t gpa = address(info, 0, "gpa");
    if (!machine_->board().memory.contains(gpa, length)) {
      refuse(info.Env(), "the physical range lies outside the guest's memory");
    }
    return gpa;
  }

  uint64_t frameAddress(Info info, size_t index) {
    const uint64_t gfn = address(info, index, "gfn");
    if (gfn >= machine_->board().memory.size() >> kPageShift) {
      refuse(info.Env(), "the frame lies outside the guest's memory");
    }
    return gfn << kPageShift;
  }

  /** Writes the report, or that there is none, into the block that was passed. Objects would cost much more. */
  void report(Info info, size_t index, const std::optional<Report>& report) {
    Napi::BigUint64Array block = words(info, index, kReportWords, "report");
    uint64_t* const into = block.Data();
    if (!report) {
      into[kReportKind] = kNoReport;
      return;
    }
    const RegisterFile registers = readRegisters(machine_->vcpu(report->vcpu).engine());
    std::copy(registers.begin(), registers.end(), into);
    const OpenInstruction& open = machine_->open(report->vcpu);
    into[kReportKind] = report->kind;
    into[kReportVcpu] = report->vcpu;
    into[kReportAccess] = report->stop.access;
    into[kReportPage] = report->stop.page;
    into[kReportFrame] = report->stop.frame >> kPageShift;
    into[kReportErrorCode] = report->stop.errorCode;
    into[kReportCodeLength] = open.length;
    memcpy(into + kReportCode, open.bytes, open.length);
  }

  Napi::Value readPhysical(Info info) {
    const uint64_t length = integer(info, 1, "length", kMostReadBytes);
    const uint64_t gpa = physical(info, length);
    return Napi::Buffer<uint8_t>::Copy(info.Env(), machine_->board().memory.at(gpa), length);
  }

  Napi::Value writePhysical(Info info) {
    const auto source = bytes(info, 1, "bytes");
    const uint64_t gpa = physical(info, source.ElementLength());
    if (source.ElementLength() != 0) machine_->writePhysical(gpa, source.Data(), source.ElementLength());
    return info.Env().Undefined();
  }

  Napi::Value setAccess(Info info) {
    const uint64_t gpa = frameAddress(info, 0);
    machine_->setAccess(gpa, static_cast<uint8_t>(integer(info, 1, "access", kAllAccess)));
    return info.Env().Undefined();
  }

  Napi::Value access(Info info) {
    const uint64_t gpa = frameAddress(info, 0);
    return Napi::Number::New(info.Env(), machine_->board().memory.frame(gpa).rights);
  }

  Napi::Value registers(Info info) {
    const RegisterFile values = readRegisters(vcpu(info).engine());
    std::copy(values.begin(), values.end(), registerFile(info, 1).Data());
    return info.Env().Undefined();
  }

  Napi::Value setRegisters(Info info) {
    RegisterFile values;
    const auto source = registerFile(info, 1);
    std::copy_n(source.Data(), kRegisterCount, values.begin());
    const auto set = static_cast<RegisterSet>(integer(info, 2, "set", 0xffffffff));
    constexpr uint64_t kPrivilege = 3;
    const unsigned index = vcpuIndex(info);
    const uint64_t selector = readRegister(machine_->vcpu(index).engine(), UC_X86_REG_CS);
    if ((set >> kCs & 1) && ((values[kCs] ^ selector) & kPrivilege)) {
      refuse(info.Env(), "the privilege level cannot be set; let the guest change it");
    }
    machine_->setRegisters(index, values, set);
    return info.Env().Undefined();
  }

  Napi::Value readMsr(Info info) {
    const auto index = static_cast<uint32_t>(integer(info, 1, "index", 0xffffffff));
    return Napi::BigInt::New(info.Env(), memtables::readMsr(vcpu(info).engine(), index));
  }

  Napi::Value pause(Info info) {
    vcpu(info).pauses++;
    return info.Env().Undefined();
  }

  Napi::Value resume(Info info) {
    Vcpu& target = vcpu(info);
    if (target.pauses == 0) refuse(info.Env(), "the vCPU is not paused");
    target.pauses--;
    return info.Env().Undefined();
  }

  Napi::Value answer(Info info) {
    const unsigned index = trappedIndex(info);
    Answer answer;
    answer.gva = address(info, 1, "gva");
    answer.frame = frameAddress(info, 2);
    const uint64_t access = integer(info, 3, "access", kExecute);
    if (access != kRead && access != kWrite && access != kExecute) {
      refuse(info.Env(), "access must be one of 1, 2, 4");
    }
    answer.access = static_cast<Access>(access);
    if (!info[4].IsUndefined()) {
      const auto data = bytes(info, 4, "data");
      answer.data.assign(data.Data(), data.Data() + data.ElementLength());
    }
    OpenInstruction& open = machine_->open(index);
    constexpr size_t kMostAnswers = 64;
    if (open.answers.size() == kMostAnswers) refuse(info.Env(), "too many answers");
    open.answers.push_back(std::move(answer));
    return info.Env().Undefined();
  }

  Napi::Value complete(Info info) {
    const unsigned index = trappedIndex(info);
    const auto code = bytes(info, 1, "code");
    OpenInstruction& open = machine_->open(index);
    if (code.ElementLength() > sizeof open.bytes) refuse(info.Env(), "no instruction is that long");
    open.length = code.ElementLength();
    std::copy_n(code.Data(), open.length, open.bytes);
    report(info, 2, machine_->complete(index));
    return info.Env().Undefined();
  }

  Napi::Value retry(Info info) {
    machine_->retry(trappedIndex(info));
    return info.Env().Undefined();
  }

  Napi::Value raisePageFault(Info info) {
    const unsigned index = trappedIndex(info);
    const auto errorCode = static_cast<uint32_t>(integer(info, 2, "errorCode", 0xffffffff));
    machine_->raisePageFault(index, address(info, 1, "gva"), errorCode);
    return info.Env().Undefined();
  }

  Napi::Value setSingleStep(Info info) {
    if (!info[1].IsBoolean()) refuse(info.Env(), "enabled must be a boolean");
    vcpu(info).singleStep = info[1].As<Napi::Boolean>();
    return info.Env().Undefined();
  }

  Napi::Value raiseInterrupt(Info info) {
    vcpu(info).pending.set(interruptVector(info, 1));
    return info.Env().Undefined();
  }

  Napi::Value setTimer(Info info) {
    const uint64_t period = integer(info, 1, "microseconds", kMostMicroseconds);
    const uint64_t vector = period == 0 ? 0 : interruptVector(info, 0);
    machine_->setTimer(static_cast<uint8_t>(vector), period * kNanosecondsPerMicrosecond);
    return info.Env().Undefined();
  }

  Napi::Value run(Info info) {
    const uint64_t microseconds = integer(info, 0, "microseconds", kMostMicroseconds);
    if (!info[1].IsBoolean()) refuse(info.Env(), "untilInput must be a boolean");
    const bool untilInput = info[1].As<Napi::Boolean>();
    const auto called = [&] { return untilInput && inputWaits(info.Env()); };
    const auto result = machine_->run(microseconds * kNanosecondsPerMicrosecond, called);
    report(info, 2, result.report);
    return Napi::Boolean::New(info.Env(), result.idle);
  }

  Napi::Value step(Info info) {
    constexpr double kMostInstructions = 1e12;
    const auto result = machine_->step(vcpuIndex(info), integer(info, 1, "instructions", kMostInstructions));
    report(info, 2, result.report);
    return Napi::Number::New(info.Env(), static_cast<double>(result.retired));
  }

  Napi::Value takeConsole(Info info) {
    std::string text;
    text.swap(machine_->board().console);
    return Napi::Buffer<char>::Copy(info.Env(), text.data(), text.size());
  }

  Napi::Value close(Info info) {
    machine_.reset();
    return info.Env().Undefined();
  }

  std::unique_ptr<Machine> machine_;
};

Napi::Object initialise(Napi::Env env, Napi::Object exports) {
  exports.Set("NativeMachine", NativeMachine::define(env));
  return exports;
}

}  // namespace
}  // namespace memtables

static Napi::Object Init(Napi::Env env, Napi::Object exports) { return memtables::initialise(env, exports); }
NODE_API_MODULE(machine, Init)

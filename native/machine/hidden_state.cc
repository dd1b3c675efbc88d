#include "hidden_state.h"

#include <cstring>
#include <functional>
#include <vector>

#include "error.h"

namespace memtables {
namespace {

constexpr uint32_t kPrivilegeMask = 3;
constexpr uint32_t kInterruptShadow = 1u << 3;
constexpr uint32_t kTaskSwitched = 1u << 11;
constexpr uint32_t kLongMode = 1u << 14;
/** In the second word of mode flags: the task priority register is virtual. */
constexpr uint32_t kVirtualTaskPriority = 1u << 3;
constexpr int32_t kNoException = -1;

void check(uc_err error, const char* what) {
  if (error != UC_ERR_OK) throw MachineError(std::string(what) + ": " + uc_strerror(error));
}

/** A throw-away engine to learn the layout on. */
class Laboratory {
 public:
  Laboratory() {
    check(uc_open(UC_ARCH_X86, UC_MODE_64, &engine_), "open an engine");
    check(uc_ctl_set_tcg_buffer_size(engine_, 1u << 20), "size the code buffer");
    check(uc_mem_map(engine_, kCode, 0x1000, UC_PROT_ALL), "map memory");
    check(uc_context_alloc(engine_, &context_), "allocate a context");
    uc_hook hook;
    check(uc_hook_add(engine_, &hook, UC_HOOK_INTR, reinterpret_cast<void*>(&stop), nullptr, 1, 0),
          "hook exceptions");
  }
  ~Laboratory() {
    uc_context_free(context_);
    uc_close(engine_);
  }

  using Image = std::vector<uint8_t>;

  Image image() {
    check(uc_context_save(engine_, context_), "save the CPU");
    const auto* bytes = reinterpret_cast<const uint8_t*>(context_);
    return Image(bytes, bytes + uc_context_size(engine_));
  }

  /** The CPU after `code`, with rax set for it and cleared afterwards. */
  Image after(std::vector<uint8_t> code, uint64_t rax) {
    check(uc_mem_write(engine_, kCode, code.data(), code.size()), "write code");
    check(uc_ctl_flush_tb(engine_), "flush");
    set(UC_X86_REG_RAX, rax);
    uc_emu_start(engine_, kCode, kCode + code.size(), 0, 0);
    set(UC_X86_REG_RAX, 0);
    set(UC_X86_REG_RIP, kCode);
    return image();
  }

  void set(int id, uint64_t value) { check(uc_reg_write(engine_, id, &value), "write a register"); }
  uint64_t get(int id) {
    uint64_t value = 0;
    check(uc_reg_read(engine_, id, &value), "read a register");
    return value;
  }

 private:
  static constexpr uint64_t kCode = 0x1000;
  static void stop(uc_engine* engine, uint32_t, void*) { uc_emu_stop(engine); }

  uc_engine* engine_ = nullptr;
  uc_context* context_ = nullptr;
};

/** The one offset where the field of the first image and that of the second satisfy `changed`. */
template <typename T>
size_t only(const char* what, const Laboratory::Image& before, const Laboratory::Image& after,
            const std::function<bool(T, T)>& changed) {
  size_t found = 0;
  int matches = 0;
  for (size_t at = 0; at + sizeof(T) <= before.size(); at += sizeof(T)) {
    T a;
    T b;
    memcpy(&a, &before[at], sizeof a);
    memcpy(&b, &after[at], sizeof b);
    if (!changed(a, b)) continue;
    found = at;
    matches++;
  }
  if (matches != 1) {
    throw MachineError(std::string("this Unicorn keeps the ") + what + " elsewhere than version 2.1.4 does");
  }
  return found;
}

HiddenLayout learn() {
  Laboratory lab;
  HiddenLayout layout{};

  const uint64_t cr0 = lab.get(UC_X86_REG_CR0);
  const auto plain = lab.image();
  constexpr uint64_t kCr0TaskSwitched = 1u << 3;
  lab.set(UC_X86_REG_CR0, cr0 | kCr0TaskSwitched);
  const auto taskSwitched = lab.image();
  lab.set(UC_X86_REG_CR0, cr0);
  layout.modeFlags = only<uint32_t>("mode flags", plain, taskSwitched, [](uint32_t a, uint32_t b) {
    return (a ^ b) == kTaskSwitched && (a & kLongMode);
  });

  const std::vector<uint8_t> writeCr8 = {0x44, 0x0f, 0x22, 0xc0};  // mov cr8, rax
  const auto five = lab.after(writeCr8, 5);
  const auto nine = lab.after(writeCr8, 9);
  layout.taskPriority = only<uint8_t>("task priority", five, nine,
                                      [](uint8_t a, uint8_t b) { return a == 5 && b == 9; });

  constexpr int32_t kBadSelector = 0x1234;
  constexpr int32_t kGeneralProtection = 13;
  const auto calm = lab.image();
  const auto refused = lab.after({0x8e, 0xd8}, kBadSelector);  // mov ds, eax
  layout.errorCode = only<int32_t>("error code", calm, refused,
                                   [](int32_t a, int32_t b) { return a != b && b == kBadSelector; });
  layout.exceptionInFlight = only<int32_t>("exception in flight", calm, refused, [](int32_t a, int32_t b) {
    return a == kNoException && b == kGeneralProtection;
  });
  const auto software = lab.after({0xcd, 0x21}, 0);  // int 0x21
  layout.softwareInterrupt = only<int32_t>("interrupt source", refused, software,
                                           [](int32_t a, int32_t b) { return a == 0 && b == 1; });
  return layout;
}

}  // namespace

const HiddenLayout& HiddenLayout::get() {
  static const HiddenLayout layout = learn();
  return layout;
}

HiddenState::HiddenState(uc_engine* engine) : engine_(engine) {
  HiddenLayout::get();
  check(uc_context_alloc(engine, &context_), "allocate a context");
}

HiddenState::~HiddenState() { uc_context_free(context_); }

void HiddenState::load() { check(uc_context_save(engine_, context_), "save the CPU"); }
void HiddenState::store() { check(uc_context_restore(engine_, context_), "restore the CPU"); }

template <typename T>
T& HiddenState::field(size_t offset) const {
  return *reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(context_) + offset);
}

unsigned HiddenState::taskPriority() const { return field<uint8_t>(HiddenLayout::get().taskPriority); }
bool HiddenState::interruptShadow() const {
  return field<uint32_t>(HiddenLayout::get().modeFlags) & kInterruptShadow;
}
uint32_t HiddenState::errorCode() const { return field<uint32_t>(HiddenLayout::get().errorCode); }
bool HiddenState::softwareInterrupt() const {
  return field<int32_t>(HiddenLayout::get().softwareInterrupt) != 0;
}

void HiddenState::setPrivilegeLevel(unsigned level) {
  auto& flags = field<uint32_t>(HiddenLayout::get().modeFlags);
  flags = (flags & ~kPrivilegeMask) | level;
}
void HiddenState::clearInterruptShadow() {
  field<uint32_t>(HiddenLayout::get().modeFlags) &= ~kInterruptShadow;
}
void HiddenState::forgetException() { field<int32_t>(HiddenLayout::get().exceptionInFlight) = kNoException; }
void HiddenState::enableTaskPriority() {
  field<uint32_t>(HiddenLayout::get().modeFlags + sizeof(uint32_t)) |= kVirtualTaskPriority;
}

}  // namespace memtables

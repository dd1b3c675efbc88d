// CPU state that the guest depends on but Unicorn has no register for.
#pragma once

#include <unicorn/unicorn.h>

#include <cstdint>

namespace memtables {

/** Where the fields lie in a saved context, found by experiment on a scratch engine. */
struct HiddenLayout {
  size_t modeFlags;
  size_t taskPriority;
  size_t errorCode;
  size_t softwareInterrupt;
  size_t exceptionInFlight;

  /** @throws MachineError when this Unicorn behaves unlike the one we know. */
  static const HiddenLayout& get();
};

/** A snapshot of one engine's CPU: `load`, look or change, `store`. */
class HiddenState {
 public:
  explicit HiddenState(uc_engine* engine);
  ~HiddenState();
  HiddenState(const HiddenState&) = delete;
  HiddenState& operator=(const HiddenState&) = delete;

  void load();
  void store();

  /** CR8. */
  unsigned taskPriority() const;
  /** Set for the one instruction after STI and MOV SS. */
  bool interruptShadow() const;
  /** Of the exception just raised. */
  uint32_t errorCode() const;
  /** The exception just raised came from INT n or INT3. */
  bool softwareInterrupt() const;

  void setPrivilegeLevel(unsigned level);
  void clearInterruptShadow();
  /** Without this the next contributory exception becomes a double fault. */
  void forgetException();
  /** MOV from CR8 reads what MOV to CR8 wrote; without this it reads 0. */
  void enableTaskPriority();

 private:
  template <typename T>
  T& field(size_t offset) const;

  uc_engine* engine_;
  uc_context* context_ = nullptr;
};

}  // namespace memtables

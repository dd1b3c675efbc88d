// What goes wrong inside the machine; the addon turns it into a JavaScript error.
#pragma once

#include <stdexcept>
#include <string>

namespace memtables {

/** The machine cannot go on. `vcpu` is the one at fault, or -1. */
struct MachineError : std::runtime_error {
  explicit MachineError(const std::string& message, int vcpu = -1)
      : std::runtime_error(message), vcpu(vcpu) {}
  int vcpu;
};

}  // namespace memtables

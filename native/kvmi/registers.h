#pragma once

#include <libvmi/libvmi.h>

#include "wire.h"

namespace kvmi {

/** What KVMI tells about a vCPU with every event; the descriptor tables and MSRs stay zero, as in libvmi. */
x86_registers_t fromWire(const wire::Registers &general, const wire::SpecialRegisters &special);

}  // namespace kvmi

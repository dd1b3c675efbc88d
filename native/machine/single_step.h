// Exactly one instruction, by means of RFLAGS.TF, without the guest noticing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vcpu.h"

namespace memtables {

/**
 * Lets the vCPU retire the instruction whose bytes are given (those it will find at RIP). Comes back with
 * `kRetired`, `kHalted` (HLT retired) or `kException` for INT n when it has; in any other case it has not.
 * An iteration of a repeated string instruction counts as one, and so do MOV SS and POP SS with what follows
 * them. A system call is carried out, and a store to code that some vCPU has translated makes all of them
 * forget it.
 */
Stop stepInstruction(Vcpu& vcpu, const uint8_t* bytes, size_t length);

/** As above, with the bytes that are in memory now. */
Stop stepInstruction(Vcpu& vcpu);

}  // namespace memtables

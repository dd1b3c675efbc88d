// The register file as the addon hands it to JavaScript.
#pragma once

#include <unicorn/unicorn.h>

#include <array>
#include <cstdint>

namespace memtables {

/** In the order of the fields of `Registers` in src/x86/registers.ts; rax to r15 by their encodings. */
enum RegisterIndex : unsigned {
  kRax, kRcx, kRdx, kRbx, kRsp, kRbp, kRsi, kRdi,
  kR8, kR9, kR10, kR11, kR12, kR13, kR14, kR15,
  kRip, kRflags,
  kCr0, kCr2, kCr3, kCr4, kEfer, kLstar,
  kFsBase, kGsBase, kShadowGs,
  kCs, kSs, kTrBase, kIdtrBase, kGdtrBase,
  kRegisterCount
};

using RegisterFile = std::array<uint64_t, kRegisterCount>;

/** A bit each of `RegisterIndex`. */
using RegisterSet = uint32_t;

constexpr uint64_t kFlagTrap = 1ull << 8;
constexpr uint64_t kFlagInterrupt = 1ull << 9;

constexpr uint32_t kMsrEfer = 0xc0000080;
constexpr uint32_t kMsrStar = 0xc0000081;
constexpr uint32_t kMsrLstar = 0xc0000082;
constexpr uint32_t kMsrFmask = 0xc0000084;

uint64_t readRegister(uc_engine* engine, int id);
void writeRegister(uc_engine* engine, int id, uint64_t value);
uint64_t readMsr(uc_engine* engine, uint32_t index);
void writeMsr(uc_engine* engine, uint32_t index, uint64_t value);
uc_x86_mmr readTable(uc_engine* engine, int id);

RegisterFile readRegisters(uc_engine* engine);
/** Writes those of `set`. Selectors only change their number, not the privilege level. */
void writeRegisters(uc_engine* engine, const RegisterFile& values, RegisterSet set);

}  // namespace memtables

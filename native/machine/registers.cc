#include "registers.h"

#include "error.h"

namespace memtables {
namespace {

/** Those that one register number of Unicorn stands for; the rest are MSRs and descriptor tables. */
struct Plain {
  RegisterIndex index;
  int id;
};

constexpr Plain kPlain[] = {
    {kRax, UC_X86_REG_RAX},       {kRcx, UC_X86_REG_RCX},       {kRdx, UC_X86_REG_RDX},
    {kRbx, UC_X86_REG_RBX},       {kRsp, UC_X86_REG_RSP},       {kRbp, UC_X86_REG_RBP},
    {kRsi, UC_X86_REG_RSI},       {kRdi, UC_X86_REG_RDI},       {kR8, UC_X86_REG_R8},
    {kR9, UC_X86_REG_R9},         {kR10, UC_X86_REG_R10},       {kR11, UC_X86_REG_R11},
    {kR12, UC_X86_REG_R12},       {kR13, UC_X86_REG_R13},       {kR14, UC_X86_REG_R14},
    {kR15, UC_X86_REG_R15},       {kRip, UC_X86_REG_RIP},       {kRflags, UC_X86_REG_RFLAGS},
    {kCr2, UC_X86_REG_CR2},       {kCr3, UC_X86_REG_CR3},       {kCr4, UC_X86_REG_CR4},
    {kCr0, UC_X86_REG_CR0},       {kFsBase, UC_X86_REG_FS_BASE}, {kGsBase, UC_X86_REG_GS_BASE},
    {kCs, UC_X86_REG_CS},         {kSs, UC_X86_REG_SS},
};

struct Msr {
  RegisterIndex index;
  uint32_t msr;
};

constexpr uint32_t kMsrKernelGsBase = 0xc0000102;
constexpr Msr kMsrs[] = {{kEfer, kMsrEfer}, {kLstar, kMsrLstar}, {kShadowGs, kMsrKernelGsBase}};

struct Table {
  RegisterIndex index;
  int id;
  /** Only its base is in the register file; a table that had none gets this limit. */
  uint32_t limit;
};

constexpr uint32_t kBusyTss = 0x8b00;
constexpr Table kTables[] = {
    {kTrBase, UC_X86_REG_TR, 0x67}, {kIdtrBase, UC_X86_REG_IDTR, 0xfff}, {kGdtrBase, UC_X86_REG_GDTR, 0xffff}};

void check(uc_err error) {
  if (error != UC_ERR_OK) throw MachineError(std::string("register access failed: ") + uc_strerror(error));
}

}  // namespace

uint64_t readRegister(uc_engine* engine, int id) {
  uint64_t value = 0;
  check(uc_reg_read(engine, id, &value));
  return value;
}

void writeRegister(uc_engine* engine, int id, uint64_t value) { check(uc_reg_write(engine, id, &value)); }

uint64_t readMsr(uc_engine* engine, uint32_t index) {
  uc_x86_msr msr{index, 0};
  check(uc_reg_read(engine, UC_X86_REG_MSR, &msr));
  return msr.value;
}

void writeMsr(uc_engine* engine, uint32_t index, uint64_t value) {
  uc_x86_msr msr{index, value};
  check(uc_reg_write(engine, UC_X86_REG_MSR, &msr));
}

uc_x86_mmr readTable(uc_engine* engine, int id) {
  uc_x86_mmr table{};
  check(uc_reg_read(engine, id, &table));
  return table;
}

RegisterFile readRegisters(uc_engine* engine) {
  RegisterFile values{};
  for (const auto& [index, id] : kPlain) values[index] = readRegister(engine, id);
  for (const auto& [index, msr] : kMsrs) values[index] = readMsr(engine, msr);
  for (const auto& table : kTables) values[table.index] = readTable(engine, table.id).base;
  return values;
}

void writeRegisters(uc_engine* engine, const RegisterFile& values, RegisterSet set) {
  const auto wanted = [set](RegisterIndex index) { return (set >> index) & 1; };
  // Before CR0: entering long mode looks at EFER.
  for (const auto& [index, msr] : kMsrs) {
    if (wanted(index)) writeMsr(engine, msr, values[index]);
  }
  for (const auto& [index, id] : kPlain) {
    if (wanted(index)) writeRegister(engine, id, values[index]);
  }
  for (const auto& [index, id, limit] : kTables) {
    if (!wanted(index)) continue;
    auto table = readTable(engine, id);
    table.base = values[index];
    if (table.limit == 0) table.limit = limit;
    if (index == kTrBase) table.flags |= kBusyTss;
    check(uc_reg_write(engine, id, &table));
  }
}

}  // namespace memtables

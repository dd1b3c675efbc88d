#include "vcpu.h"

#include <cstring>

#include "error.h"
#include "interrupts.h"

namespace memtables {
namespace {

/** Engine-physical address of the shadow frames; guest-physical memory ends far below. */
constexpr uint64_t kShadowBase = 1ull << 40;
/** A non-canonical address: no instruction of the guest gets there. */
constexpr uint64_t kProbePage = 0x0000900000000000ull;
constexpr uint32_t kTranslationBufferBytes = 64u << 20;
constexpr uint64_t kUnlimitedBlocks = ~0ull;
constexpr uint32_t kConsolePort = 0xe9;
/** What nobody takes is dropped: the guest shall not fill the host's memory. */
constexpr size_t kMostConsoleBytes = 1u << 20;
constexpr uint64_t kSelectorPrivilege = 3;
/** What a processor begins with: every exception masked. */
constexpr uint64_t kResetMxcsr = 0x1f80;

void check(uc_err error, const char* what, unsigned vcpu) {
  if (error != UC_ERR_OK) {
    throw MachineError(std::string(what) + ": " + uc_strerror(error), static_cast<int>(vcpu));
  }
}

uint32_t protection(uint8_t rights) {
  uint32_t protection = 0;
  if (rights & kRead) protection |= UC_PROT_READ;
  if (rights & kWrite) protection |= UC_PROT_WRITE;
  if (rights & kExecute) protection |= UC_PROT_EXEC;
  return protection;
}

Access accessOf(uc_mem_type type) {
  switch (type) {
    case UC_MEM_WRITE:
      return kWrite;
    case UC_MEM_FETCH:
      return kExecute;
    default:
      return kRead;
  }
}

}  // namespace

Engine::Engine(unsigned vcpu) {
  check(uc_open(UC_ARCH_X86, UC_MODE_64, &handle_), "an engine could not be opened", vcpu);
  // Both count only before the first other call.
  uc_ctl_set_cpu_model(handle_, UC_CPU_X86_SKYLAKE_CLIENT);
  uc_ctl_set_tcg_buffer_size(handle_, kTranslationBufferBytes);
}

Vcpu::Vcpu(Board& board, unsigned index)
    : board_(board),
      index_(index),
      shadow_(kShadowFrames * kPageSize),
      engine_(index),
      hidden_(engine_) {
  check(uc_ctl_tlb_mode(engine_, UC_TLB_VIRTUAL), "the virtual TLB is not available", index);
  // Otherwise virtual address 0 would mean "stop".
  check(uc_ctl_exits_enable(engine_), "exits cannot be configured", index);
  check(uc_mem_map_ptr(engine_, 0, board.memory.size(), UC_PROT_ALL, board.memory.at(0)),
        "guest memory could not be mapped", index);
  check(uc_mem_map_ptr(engine_, kShadowBase, shadow_.size(), UC_PROT_ALL, shadow_.data()),
        "shadow memory could not be mapped", index);
  // The engine has left it zero.
  writeRegister(engine_, UC_X86_REG_MXCSR, kResetMxcsr);
  addHook(UC_HOOK_TLB_FILL, reinterpret_cast<void*>(&onTlbFill));
  addHook(UC_HOOK_BLOCK, reinterpret_cast<void*>(&onBlock));
  addHook(UC_HOOK_INTR, reinterpret_cast<void*>(&onException));
  addHook(UC_HOOK_INSN_INVALID, reinterpret_cast<void*>(&onInvalidInstruction));
  addHook(UC_HOOK_INSN, reinterpret_cast<void*>(&onSystemCall), UC_X86_INS_SYSCALL);
  addHook(UC_HOOK_INSN, reinterpret_cast<void*>(&onCpuid), UC_X86_INS_CPUID);
  addHook(UC_HOOK_INSN, reinterpret_cast<void*>(&onTimestamp), UC_X86_INS_RDTSC);
  addHook(UC_HOOK_INSN, reinterpret_cast<void*>(&onTimestampAndProcessor), UC_X86_INS_RDTSCP);
  addHook(UC_HOOK_INSN, reinterpret_cast<void*>(&onPortWrite), UC_X86_INS_OUT);
  addHook(UC_HOOK_INSN, reinterpret_cast<void*>(&onPortRead), UC_X86_INS_IN);
  hidden_.load();
  hidden_.enableTaskPriority();
  hidden_.store();
}

void Vcpu::addHook(int type, void* callback, int instruction) {
  uc_hook hook;
  constexpr uint64_t kEverywhereFrom = 1;
  constexpr uint64_t kEverywhereTo = 0;
  check(uc_hook_add(engine_, &hook, type, callback, this, kEverywhereFrom, kEverywhereTo, instruction),
        "a hook could not be installed", index_);
}

uint64_t Vcpu::shadowFrame(unsigned index) const { return kShadowBase + index * kPageSize; }

PagingState Vcpu::paging() const {
  PagingState state;
  state.cr0 = readRegister(engine_, UC_X86_REG_CR0);
  state.cr3 = readRegister(engine_, UC_X86_REG_CR3);
  state.cr4 = readRegister(engine_, UC_X86_REG_CR4);
  state.rflags = readRegister(engine_, UC_X86_REG_RFLAGS);
  state.efer = readMsr(engine_, kMsrEfer);
  state.user = (readRegister(engine_, UC_X86_REG_CS) & kSelectorPrivilege) == kSelectorPrivilege;
  return state;
}

Translation Vcpu::translate(uint64_t gva, Access access, Marks marks) const {
  return walk(board_.memory, paging(), gva, access, marks);
}

bool Vcpu::fill(uint64_t page, Access access, uc_tlb_entry& entry) {
  if (probedFrame_) {
    entry.paddr = *probedFrame_;
    entry.perms = UC_PROT_EXEC;
    return true;
  }
  for (const Grant& grant : grants) {
    if (grant.page != page || grant.access != access) continue;
    entry.paddr = grant.frame;
    entry.perms = static_cast<uc_prot>(protection(access));
    return true;
  }

  Stop stop;
  stop.access = access;
  stop.page = page;
  const Translation translation = translate(page, access, Marks::kSet);
  stop.frame = translation.frame;
  stop.errorCode = translation.errorCode;
  const uint32_t self = 1u << index_;
  switch (translation.outcome) {
    case Translation::kPageFault:
      stop.kind = StopKind::kGuestFault;
      stop_ = stop;
      return false;
    case Translation::kNonCanonical:
      stop.kind = StopKind::kNonCanonical;
      stop_ = stop;
      return false;
    case Translation::kMapped:
      break;
  }
  Frame& frame = board_.memory.frame(translation.frame);
  if (!(frame.rights & access)) {
    stop.kind = StopKind::kDenied;
    stop_ = stop;
    return false;
  }
  if (access == kWrite && frame.translatedBy != 0) {
    stop.kind = StopKind::kWriteToCode;
    stop_ = stop;
    return false;
  }
  if (access == kExecute && frame.writableBy != 0) {
    stop.kind = StopKind::kExecuteWritten;
    stop_ = stop;
    return false;
  }
  if (access == kWrite) frame.writableBy |= self;
  if (access == kExecute) frame.translatedBy |= self;
  uint8_t rights = translation.rights & frame.rights;
  if (!(frame.writableBy & self)) rights &= static_cast<uint8_t>(~kWrite);
  if (!(frame.translatedBy & self)) rights &= static_cast<uint8_t>(~kExecute);
  entry.paddr = translation.frame;
  entry.perms = static_cast<uc_prot>(protection(rights));
  return true;
}

void Vcpu::applyForgotten() {
  if (!staleCode_.empty()) {
    for (const uint64_t frame : staleCode_) {
      // The engine invalidates by virtual address, so it is given one that leads to the frame.
      check(uc_ctl_flush_tlb(engine_), "the TLB could not be flushed", index_);
      probedFrame_ = frame;
      const uc_err error = uc_ctl_remove_cache(engine_, kProbePage, kProbePage + kPageSize);
      probedFrame_.reset();
      check(error, "translated code could not be dropped", index_);
    }
    staleCode_.clear();
    staleTlb_ = true;
  }
  if (!staleTlb_) return;
  check(uc_ctl_flush_tlb(engine_), "the TLB could not be flushed", index_);
  staleTlb_ = false;
}

Stop Vcpu::enter() {
  applyForgotten();
  stop_.reset();
  const uc_err error = uc_emu_start(engine_, readRegister(engine_, UC_X86_REG_RIP), 0, 0, 0);
  if (error != UC_ERR_OK && !stop_) check(error, "the engine failed", index_);
  return stop_.value_or(Stop{});
}

Stop Vcpu::run(uint64_t& blocks) {
  blocksLeft_ = blocks;
  stepping_ = false;
  const Stop stop = enter();
  blocks = blocksLeft_;
  return stop;
}

Stop Vcpu::runTrapFlag() {
  blocksLeft_ = kUnlimitedBlocks;
  stepping_ = true;
  const Stop stop = enter();
  stepping_ = false;
  return stop;
}

void Vcpu::stopWith(StopKind kind, uint32_t vector) {
  if (!stop_) {
    Stop stop;
    stop.kind = kind;
    stop.vector = vector;
    stop_ = stop;
  }
  uc_emu_stop(engine_);
}

bool Vcpu::onTlbFill(uc_engine*, uint64_t page, uc_mem_type type, uc_tlb_entry* entry, void* self) {
  return static_cast<Vcpu*>(self)->fill(page, accessOf(type), *entry);
}

void Vcpu::onBlock(uc_engine*, uint64_t, uint32_t, void* self) {
  auto* vcpu = static_cast<Vcpu*>(self);
  if (vcpu->blocksLeft_ == 0) {
    vcpu->stopWith(StopKind::kSliceEnd);
  } else {
    vcpu->blocksLeft_--;
  }
}

void Vcpu::onException(uc_engine*, uint32_t vector, void* self) {
  auto* vcpu = static_cast<Vcpu*>(self);
  const bool step = vcpu->stepping_ && vector == kVectorDebug;
  vcpu->stopWith(step ? StopKind::kRetired : StopKind::kException, vector);
}

bool Vcpu::onInvalidInstruction(uc_engine*, void* self) {
  static_cast<Vcpu*>(self)->stopWith(StopKind::kException, kVectorInvalidOpcode);
  return true;
}

void Vcpu::onSystemCall(uc_engine*, void* self) {
  static_cast<Vcpu*>(self)->stopWith(StopKind::kSystemCall);
}

int Vcpu::onCpuid(uc_engine* engine, void*) {
  constexpr uint32_t kHypervisorLeaf = 0x40000000;
  const auto leaf = static_cast<uint32_t>(readRegister(engine, UC_X86_REG_RAX));
  if (leaf != kHypervisorLeaf) return 0;
  // "memtables vm", as hypervisors sign: in ebx, ecx, edx; eax is the highest such leaf.
  writeRegister(engine, UC_X86_REG_RAX, kHypervisorLeaf);
  writeRegister(engine, UC_X86_REG_RBX, 0x746d656d);
  writeRegister(engine, UC_X86_REG_RCX, 0x656c6261);
  writeRegister(engine, UC_X86_REG_RDX, 0x6d762073);
  return 1;
}

int Vcpu::onTimestamp(uc_engine* engine, void* self) {
  constexpr unsigned kHalf = 32;
  const uint64_t clock = static_cast<Vcpu*>(self)->board_.clock();
  writeRegister(engine, UC_X86_REG_RAX, clock & 0xffffffff);
  writeRegister(engine, UC_X86_REG_RDX, clock >> kHalf);
  return 1;
}

int Vcpu::onTimestampAndProcessor(uc_engine* engine, void* self) {
  constexpr uint32_t kMsrTscAux = 0xc0000103;
  writeRegister(engine, UC_X86_REG_RCX, readMsr(engine, kMsrTscAux) & 0xffffffff);
  return onTimestamp(engine, self);
}

void Vcpu::onPortWrite(uc_engine*, uint32_t port, int, uint32_t value, void* self) {
  std::string& console = static_cast<Vcpu*>(self)->board_.console;
  if (port == kConsolePort && console.size() < kMostConsoleBytes) console.push_back(static_cast<char>(value));
}

uint32_t Vcpu::onPortRead(uc_engine*, uint32_t, int, void*) { return ~0u; }

}  // namespace memtables

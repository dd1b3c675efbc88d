// One vCPU: a Unicorn engine whose every address goes through the guest's page tables and the frames' rights.
#pragma once

#include <unicorn/unicorn.h>

#include <bitset>
#include <cstdint>
#include <optional>
#include <vector>

#include "board.h"
#include "hidden_state.h"
#include "memory.h"
#include "page_walk.h"
#include "registers.h"

namespace memtables {

/** Why an engine came back. */
enum class StopKind {
  kHalted,         // HLT retired
  kSliceEnd,       // the blocks it was given are used up
  kRetired,        // one instruction, while stepping
  kException,      // `vector` was raised by the CPU or by INT n
  kSystemCall,     // SYSCALL retired, but did nothing yet
  kGuestFault,     // the guest's page tables refuse: #PF with `errorCode`
  kNonCanonical,   // no page table can map it: #GP
  kDenied,         // the frame's rights refuse
  kWriteToCode,    // the frame is translated
  kExecuteWritten  // the frame is writable by some vCPU
};

struct Stop {
  StopKind kind = StopKind::kHalted;
  Access access = kRead;
  /** GVA of the page; the engine does not tell where in it. */
  uint64_t page = 0;
  /** GPA of the frame. */
  uint64_t frame = 0;
  uint32_t vector = 0;
  uint32_t errorCode = 0;
};

/** Lets one instruction access a page whatever its rights, possibly on other bytes. */
struct Grant {
  uint64_t page;
  Access access;
  /** Physical, as the engine sees it: RAM or a shadow frame. */
  uint64_t frame;
};

/** An engine of the processor model that all vCPUs are, closed at the end. */
class Engine {
 public:
  explicit Engine(unsigned vcpu);
  ~Engine() { uc_close(handle_); }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  operator uc_engine*() const { return handle_; }

 private:
  uc_engine* handle_ = nullptr;
};

class Vcpu {
 public:
  Vcpu(Board& board, unsigned index);
  Vcpu(const Vcpu&) = delete;
  Vcpu& operator=(const Vcpu&) = delete;

  unsigned index() const { return index_; }
  uc_engine* engine() const { return engine_; }
  Board& board() const { return board_; }
  HiddenState& hidden() { return hidden_; }

  /** Runs freely for up to `blocks` basic blocks, which are subtracted. */
  Stop run(uint64_t& blocks);
  /** Runs with RFLAGS.TF, as the caller has set it, until the CPU's single-step trap. */
  Stop runTrapFlag();

  /** Drops what the engine knows about the frame's code, before it runs again. */
  void forgetCode(uint64_t gpa) { staleCode_.push_back(gpa); }
  /** Drops the engine's TLB, before it runs again. */
  void forgetTranslations() { staleTlb_ = true; }

  PagingState paging() const;
  Translation translate(uint64_t gva, Access access, Marks marks) const;

  static constexpr unsigned kShadowFrames = 16;
  /** A frame that only this engine sees: its bytes, and where the engine finds it. */
  uint8_t* shadowBytes(unsigned index) const { return shadow_.data() + index * kPageSize; }
  uint64_t shadowFrame(unsigned index) const;

  std::vector<Grant> grants;
  /** Vectors raised and not taken yet. */
  std::bitset<256> pending;
  bool halted = true;
  bool singleStep = false;
  /** A trap is open: the instruction waits for `complete`. */
  bool trapped = false;
  unsigned pauses = 0;
  /** Registers set while a trap is open. */
  RegisterFile deferred{};
  RegisterSet deferredSet = 0;

 private:
  static bool onTlbFill(uc_engine*, uint64_t page, uc_mem_type type, uc_tlb_entry* entry, void* self);
  static void onBlock(uc_engine*, uint64_t, uint32_t, void* self);
  static void onException(uc_engine*, uint32_t vector, void* self);
  static bool onInvalidInstruction(uc_engine*, void* self);
  static void onSystemCall(uc_engine*, void* self);
  static int onCpuid(uc_engine*, void* self);
  static int onTimestamp(uc_engine*, void* self);
  static int onTimestampAndProcessor(uc_engine*, void* self);
  static void onPortWrite(uc_engine*, uint32_t port, int size, uint32_t value, void* self);
  static uint32_t onPortRead(uc_engine*, uint32_t port, int size, void* self);

  void addHook(int type, void* callback, int instruction = 0);
  bool fill(uint64_t page, Access access, uc_tlb_entry& entry);
  void stopWith(StopKind kind, uint32_t vector = 0);
  void applyForgotten();
  Stop enter();

  Board& board_;
  const unsigned index_;
  // In this order: the engine uses the memory, the saved state belongs to the engine.
  HostMemory shadow_;
  Engine engine_;
  HiddenState hidden_;
  std::optional<Stop> stop_;
  uint64_t blocksLeft_ = 0;
  bool stepping_ = false;
  std::vector<uint64_t> staleCode_;
  bool staleTlb_ = false;
  /** While code of this frame is being dropped. */
  std::optional<uint64_t> probedFrame_;
};

}  // namespace memtables

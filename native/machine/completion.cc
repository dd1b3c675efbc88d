#include "completion.h"

#include <algorithm>
#include <cstring>

#include "error.h"
#include "single_step.h"

namespace memtables {
namespace {

/** Hands out the vCPU's shadow frames, and takes away all traces of them at the end. */
class Shadows {
 public:
  explicit Shadows(Vcpu& vcpu) : vcpu_(vcpu) {}
  ~Shadows() {
    for (const uint64_t frame : executed_) vcpu_.forgetCode(frame);
    vcpu_.grants.clear();
    vcpu_.forgetTranslations();
  }

  /** Makes `access` to the page see a copy of the frame, and returns the copy. */
  uint8_t* cover(uint64_t page, Access access, const uint8_t* original) {
    if (used_ == Vcpu::kShadowFrames) throw MachineError("an instruction touches too many pages");
    const unsigned index = used_++;
    uint8_t* bytes = vcpu_.shadowBytes(index);
    if (original != nullptr) {
      memcpy(bytes, original, kPageSize);
    } else {
      memset(bytes, 0, kPageSize);
    }
    vcpu_.grants.push_back({page, access, vcpu_.shadowFrame(index)});
    if (access == kExecute) executed_.push_back(vcpu_.shadowFrame(index));
    return bytes;
  }

 private:
  Vcpu& vcpu_;
  unsigned used_ = 0;
  /** Dropping code is dear, and most shadows hold data. */
  std::vector<uint64_t> executed_;
};

/** Lets the pieces through; those of one page and access share a shadow. */
void grantAnswers(Vcpu& vcpu, Shadows& shadows, const std::vector<Answer>& answers) {
  struct Covered {
    uint64_t page;
    uint8_t* bytes;
  };
  std::vector<Covered> covered;
  for (const Answer& answer : answers) {
    const uint64_t page = pageOf(answer.gva);
    if (answer.data.empty() || answer.access != kRead) continue;
    auto found = std::find_if(covered.begin(), covered.end(), [&](auto& c) { return c.page == page; });
    if (found == covered.end()) {
      covered.push_back({page, shadows.cover(page, kRead, vcpu.board().memory.at(answer.frame))});
      found = std::prev(covered.end());
    }
    const uint64_t offset = offsetIn(answer.gva);
    memcpy(found->bytes + offset, answer.data.data(), std::min<size_t>(answer.data.size(), kPageSize - offset));
  }
  // The first grant of a page and access counts: the real frame only where no shadow stands in.
  for (const Answer& answer : answers) {
    if (answer.access == kExecute) vcpu.board().claimForCode(answer.frame, vcpu);
    vcpu.grants.push_back({pageOf(answer.gva), answer.access, answer.frame});
  }
}

/**
 * Where memory no longer holds the decoded bytes, this vCPU fetches them from a shadow. An instruction that was
 * fetched before it trapped is so again, whatever its page's rights are now.
 */
void grantCode(Vcpu& vcpu, Shadows& shadows, const OpenInstruction& instruction, uint64_t rip) {
  const auto& answers = instruction.answers;
  const bool fetched = std::none_of(answers.begin(), answers.end(),
                                    [](const Answer& answer) { return answer.access == kExecute; });
  Board& board = vcpu.board();
  for (size_t done = 0; done < instruction.length;) {
    const uint64_t at = rip + done;
    const size_t piece = std::min<size_t>(instruction.length - done, kPageSize - offsetIn(at));
    const auto found = vcpu.translate(at, kExecute, Marks::kNone);
    const uint8_t* page = found.outcome == Translation::kMapped ? board.memory.at(found.frame) : nullptr;
    if (page == nullptr || memcmp(page + offsetIn(at), instruction.bytes + done, piece) != 0) {
      vcpu.forgetTranslations();
      memcpy(shadows.cover(pageOf(at), kExecute, page) + offsetIn(at), instruction.bytes + done, piece);
    } else if (fetched && !(board.memory.frame(found.frame).rights & kExecute)) {
      board.claimForCode(found.frame, vcpu);
      vcpu.grants.push_back({pageOf(at), kExecute, found.frame});
    }
    done += piece;
  }
}

}  // namespace

Stop carryOut(Vcpu& vcpu, const OpenInstruction& instruction) {
  Shadows shadows(vcpu);
  grantCode(vcpu, shadows, instruction, readRegister(vcpu.engine(), UC_X86_REG_RIP));
  grantAnswers(vcpu, shadows, instruction.answers);
  const Stop stop = stepInstruction(vcpu, instruction.bytes, instruction.length);
  for (const Answer& answer : instruction.answers) {
    if (answer.access == kWrite) vcpu.board().codeChanged(answer.frame);
  }
  return stop;
}

}  // namespace memtables

#include "guest_access.h"

#include <algorithm>
#include <cstring>

namespace memtables {
namespace {

size_t pieceOf(uint64_t gva, size_t length) {
  return std::min<size_t>(length, kPageSize - offsetIn(gva));
}

/** Calls `use(gpa, offset, length)` for each page's piece once all of them are known to be accessible. */
template <typename Use>
std::optional<AccessFault> eachPiece(Vcpu& vcpu, uint64_t gva, size_t length, Access access, Use use) {
  PagingState state = vcpu.paging();
  state.user = false;
  for (const bool commit : {false, true}) {
    for (size_t done = 0; done < length;) {
      const uint64_t at = gva + done;
      const size_t piece = pieceOf(at, length - done);
      const auto found = walk(vcpu.board().memory, state, at, access, commit ? Marks::kSet : Marks::kNone);
      if (found.outcome != Translation::kMapped) return AccessFault{at, found.errorCode};
      if (commit) use(found.frame + offsetIn(at), done, piece);
      done += piece;
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<AccessFault> readAsCpu(Vcpu& vcpu, uint64_t gva, void* bytes, size_t length) {
  return eachPiece(vcpu, gva, length, kRead, [&](uint64_t gpa, size_t offset, size_t piece) {
    memcpy(static_cast<uint8_t*>(bytes) + offset, vcpu.board().memory.at(gpa), piece);
  });
}

std::optional<AccessFault> writeAsCpu(Vcpu& vcpu, uint64_t gva, const void* bytes, size_t length) {
  return eachPiece(vcpu, gva, length, kWrite, [&](uint64_t gpa, size_t offset, size_t piece) {
    memcpy(vcpu.board().memory.at(gpa), static_cast<const uint8_t*>(bytes) + offset, piece);
    vcpu.board().codeChanged(gpa);
  });
}

size_t fetchCode(const Vcpu& vcpu, uint64_t gva, uint8_t* bytes, size_t limit) {
  const PagingState state = vcpu.paging();
  size_t done = 0;
  while (done < limit) {
    const uint64_t at = gva + done;
    const auto found = walk(vcpu.board().memory, state, at, kExecute, Marks::kNone);
    if (found.outcome != Translation::kMapped) break;
    const size_t piece = pieceOf(at, limit - done);
    memcpy(bytes + done, vcpu.board().memory.at(found.frame + offsetIn(at)), piece);
    done += piece;
  }
  return done;
}

}  // namespace memtables

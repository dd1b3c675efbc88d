#include "page_walk.h"

#include <cstring>

namespace memtables {
namespace {

constexpr uint64_t kPresent = 1ull << 0;
constexpr uint64_t kWritable = 1ull << 1;
constexpr uint64_t kUser = 1ull << 2;
constexpr uint64_t kAccessed = 1ull << 5;
constexpr uint64_t kDirty = 1ull << 6;
constexpr uint64_t kLarge = 1ull << 7;
constexpr uint64_t kNoExecute = 1ull << 63;
constexpr uint64_t kAddress = 0x000ffffffffff000ull;
constexpr uint64_t kLargePageAttribute = 1ull << 12;

constexpr uint64_t kCr0WriteProtect = 1ull << 16;
constexpr uint64_t kCr0Paging = 1ull << 31;
constexpr uint64_t kCr4Smep = 1ull << 20;
constexpr uint64_t kCr4Smap = 1ull << 21;
constexpr uint64_t kEferNoExecute = 1ull << 11;
constexpr uint64_t kFlagsAlignmentCheck = 1ull << 18;

constexpr uint32_t kErrorPresent = 1;
constexpr uint32_t kErrorWrite = 2;
constexpr uint32_t kErrorUser = 4;
constexpr uint32_t kErrorReserved = 8;
constexpr uint32_t kErrorFetch = 16;

constexpr int kLevels = 4;
constexpr int kLeafLevel = 1;
constexpr int kLargestLeafLevel = 3;

bool canonical(uint64_t gva) {
  const auto top = static_cast<int64_t>(gva) >> 47;
  return top == 0 || top == -1;
}

uint8_t allowedBy(const PagingState& state, bool user, bool writable, bool executable) {
  if (state.user) {
    if (!user) return 0;
    return kRead | (writable ? kWrite : 0) | (executable ? kExecute : 0);
  }
  uint8_t rights = 0;
  const bool smap = user && (state.cr4 & kCr4Smap) && !(state.rflags & kFlagsAlignmentCheck);
  if (!smap) {
    rights |= kRead;
    if (writable || !(state.cr0 & kCr0WriteProtect)) rights |= kWrite;
  }
  if (executable && !(user && (state.cr4 & kCr4Smep))) rights |= kExecute;
  return rights;
}

}  // namespace

Translation walk(const GuestMemory& memory, const PagingState& state, uint64_t gva, Access access,
                 Marks marks) {
  Translation result{Translation::kPageFault};
  if (!(state.cr0 & kCr0Paging)) {
    if (!memory.contains(pageOf(gva), kPageSize)) return result;
    return {Translation::kMapped, pageOf(gva), kAllAccess};
  }
  if (!canonical(gva)) return {Translation::kNonCanonical};

  const bool noExecute = state.efer & kEferNoExecute;
  result.errorCode = (access == kWrite ? kErrorWrite : 0) | (state.user ? kErrorUser : 0);
  if (access == kExecute && (noExecute || (state.cr4 & kCr4Smep))) result.errorCode |= kErrorFetch;

  bool user = true;
  bool writable = true;
  bool executable = true;
  uint64_t entries[kLevels + 1] = {};
  uint64_t values[kLevels + 1] = {};
  uint64_t table = state.cr3 & kAddress;
  int level = kLevels;
  for (;; level--) {
    const unsigned shift = kPageShift + 9 * (level - 1);
    const uint64_t address = table + ((gva >> shift) & 0x1ff) * 8;
    uint64_t entry = 0;
    if (!memory.contains(address, sizeof entry)) {
      result.errorCode |= kErrorPresent | kErrorReserved;
      return result;
    }
    memcpy(&entry, memory.at(address), sizeof entry);
    if (!(entry & kPresent)) return result;

    const bool leaf = level == kLeafLevel || (level <= kLargestLeafLevel && (entry & kLarge));
    uint64_t reserved = noExecute ? 0 : kNoExecute;
    if (level > kLargestLeafLevel) reserved |= kLarge;
    const uint64_t offsetBits = (1ull << shift) - 1;
    if (leaf && level != kLeafLevel) reserved |= offsetBits & kAddress & ~kLargePageAttribute;
    if (entry & reserved) {
      result.errorCode |= kErrorPresent | kErrorReserved;
      return result;
    }
    user = user && (entry & kUser);
    writable = writable && (entry & kWritable);
    executable = executable && !(entry & kNoExecute);
    entries[level] = address;
    values[level] = entry;
    table = entry & kAddress;
    if (leaf) {
      result.frame = (table & ~offsetBits) | (pageOf(gva) & offsetBits);
      break;
    }
  }

  result.rights = allowedBy(state, user, writable, executable);
  if (!(result.rights & access)) {
    result.errorCode |= kErrorPresent;
    return result;
  }
  if (!memory.contains(result.frame, kPageSize)) {
    result.errorCode |= kErrorPresent | kErrorReserved;
    return result;
  }
  for (int at = kLevels; at >= level; at--) {
    uint64_t marked = values[at] | kAccessed;
    if (at == level && access == kWrite) marked |= kDirty;
    if (marks == Marks::kSet && marked != values[at]) memcpy(memory.at(entries[at]), &marked, sizeof marked);
    if (at == level && !(marked & kDirty)) result.rights &= static_cast<uint8_t>(~kWrite);
  }
  result.outcome = Translation::kMapped;
  return result;
}

}  // namespace memtables

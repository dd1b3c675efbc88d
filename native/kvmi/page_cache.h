#pragma once

#include <libvmi/libvmi.h>

#include <array>
#include <cstdint>
#include <unordered_map>

namespace kvmi {

constexpr unsigned kPageShift = 12;
constexpr size_t kPageSize = size_t{1} << kPageShift;
constexpr addr_t kPageOffsetMask = kPageSize - 1;

using Page = std::array<uint8_t, kPageSize>;

/** Guest pages that cannot have changed since they were read; whoever lets the guest go on drops them. */
class PageCache {
 public:
  const Page *find(addr_t gfn) const {
    const auto found = pages_.find(gfn);
    return found == pages_.end() ? nullptr : &found->second;
  }

  void insert(addr_t gfn, const Page &page) {
    if (pages_.size() >= kMaxPages) pages_.clear();
    pages_.insert_or_assign(gfn, page);
  }

  void drop(addr_t gfn) { pages_.erase(gfn); }
  void clear() { pages_.clear(); }

 private:
  static constexpr size_t kMaxPages = 512;
  std::unordered_map<addr_t, Page> pages_;
};

}  // namespace kvmi

#pragma once

#include <libvmi/libvmi.h>

#include <array>
#include <cstdint>
#include <ctime>
#include <list>
#include <optional>
#include <unordered_map>

namespace vmi {

constexpr unsigned kPageShift = 12;
constexpr size_t kPageSize = size_t{1} << kPageShift;
constexpr addr_t kPageOffsetMask = kPageSize - 1;

using Page = std::array<uint8_t, kPageSize>;

/**
 * Guest pages as they were when they were last read, for as long as libvmi keeps them: whoever needs them as they are
 * now has to flush them. That a page could not be read is kept, too.
 */
class PageCache {
 public:
  /** The page, null if it cannot be read. `fetch(gfn)` reads it, unless that was done lately. */
  template <typename Fetch>
  const Page *get(addr_t gfn, Fetch fetch) {
    const time_t now = time(nullptr);
    auto found = entries_.find(gfn);
    if (found == entries_.end()) {
      if (order_.size() >= kMaxPages) shrink();
      found = entries_.emplace(gfn, Entry{order_.insert(order_.begin(), gfn), now, fetch(gfn)}).first;
    } else if (now - found->second.readAt > kMaxAgeSeconds) {
      order_.splice(order_.begin(), order_, found->second.position);
      found->second.readAt = now;
      found->second.page = fetch(gfn);
    }
    const auto &page = found->second.page;
    return page ? &*page : nullptr;
  }

  void drop(addr_t gfn) {
    const auto found = entries_.find(gfn);
    if (found == entries_.end()) return;
    order_.erase(found->second.position);
    entries_.erase(found);
  }

  void clear() {
    entries_.clear();
    order_.clear();
  }

 private:
  /** By a clock of whole seconds: a page is used for one to two of them. */
  static constexpr time_t kMaxAgeSeconds = 1;
  static constexpr size_t kMaxPages = 512;

  struct Entry {
    std::list<addr_t>::iterator position;
    time_t readAt;
    std::optional<Page> page;
  };

  void shrink() {
    while (order_.size() > kMaxPages / 2) {
      entries_.erase(order_.back());
      order_.pop_back();
    }
  }

  std::unordered_map<addr_t, Entry> entries_;
  /** The last to have been read comes first. */
  std::list<addr_t> order_;
};

}  // namespace vmi

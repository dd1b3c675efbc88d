#pragma once

#include <libvmi/libvmi.h>

#include <cstddef>
#include <optional>
#include <unordered_map>

#include "page_cache.h"

namespace vmi {

/** Translations that were found, by page table and page. As in libvmi they do not age: who needs them new flushes. */
class TranslationCache {
 public:
  std::optional<addr_t> find(addr_t root, addr_t va) const {
    const auto table = byRoot_.find(root);
    if (table == byRoot_.end()) return std::nullopt;
    const auto found = table->second.find(va >> kPageShift);
    if (found == table->second.end()) return std::nullopt;
    return found->second | (va & kPageOffsetMask);
  }

  void insert(addr_t root, addr_t va, addr_t pa) {
    // libvmi takes a zero for nothing at all.
    if (root == 0 || va == 0 || pa == 0) return;
    if (size_ >= kMaxTranslations) clear();
    if (byRoot_[root].insert_or_assign(va >> kPageShift, pa & ~kPageOffsetMask).second) size_++;
  }

  void drop(addr_t root, addr_t va) {
    const auto table = byRoot_.find(root);
    if (table == byRoot_.end()) return;
    size_ -= table->second.erase(va >> kPageShift);
    // Of what is empty nothing is counted, and the guest has roots without end.
    if (table->second.empty()) byRoot_.erase(table);
  }

  void drop(addr_t root) {
    const auto table = byRoot_.find(root);
    if (table == byRoot_.end()) return;
    size_ -= table->second.size();
    byRoot_.erase(table);
  }

  void clear() {
    byRoot_.clear();
    size_ = 0;
  }

 private:
  /** The guest has as many address spaces as it likes. */
  static constexpr size_t kMaxTranslations = 64 * 1024;
  std::unordered_map<addr_t, std::unordered_map<addr_t, addr_t>> byRoot_;
  size_t size_ = 0;
};

}  // namespace vmi

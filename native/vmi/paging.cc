#include "paging.h"

#include "instance.h"
#include "memory.h"

namespace vmi {
namespace {

constexpr addr_t kPresent = 1;
constexpr addr_t kLargePage = addr_t{1} << 7;
constexpr addr_t kPrototype = addr_t{1} << 10;
constexpr addr_t kTransition = addr_t{1} << 11;
/** Bits 12 to 51. */
constexpr addr_t kFrameMask = 0x000f'ffff'ffff'f000;

constexpr unsigned kIndexBits = 9;
constexpr unsigned kTopShift = kPageShift + 3 * kIndexBits;
constexpr addr_t kIndexMask = (addr_t{1} << kIndexBits) - 1;

constexpr reg_t kCr0Paging = reg_t{1} << 31;
constexpr reg_t kCr4Pae = reg_t{1} << 5;
constexpr reg_t kEferLongMode = reg_t{1} << 8;

/** Where the walk stores the entry that it met at the level of `shift`. */
struct Slot {
  addr_t &location;
  addr_t &value;
};

Slot slotOf(page_info_t &info, unsigned shift) {
  auto &entries = info.x86_ia32e;
  switch ((shift - kPageShift) / kIndexBits) {
    case 3:
      return {entries.pml4e_location, entries.pml4e_value};
    case 2:
      return {entries.pdpte_location, entries.pdpte_value};
    case 1:
      return {entries.pgd_location, entries.pgd_value};
    default:
      return {entries.pte_location, entries.pte_value};
  }
}

bool isPresent(const vmi_instance &vmi, addr_t entry) {
  return (entry & kPresent) || (vmi.transitionPages && (entry & kTransition) && !(entry & kPrototype));
}

/**
 * The page tables belong to the guest: every entry is read through the bounds of physical memory. As libvmi's walk it
 * looks at neither the upper bits of the address nor reserved bits, and takes the top entry for a table in any case.
 */
bool walk(vmi_instance_t vmi, addr_t root, addr_t va, page_info_t &info) {
  info = {};
  info.vaddr = va;
  info.pt = root;
  info.pm = VMI_PM_IA32E;

  addr_t table = root & kFrameMask;
  for (unsigned shift = kTopShift;; shift -= kIndexBits) {
    const Slot slot = slotOf(info, shift);
    const addr_t location = table | (((va >> shift) & kIndexMask) * sizeof(addr_t));
    if (!readWithinPage(vmi, location, &slot.value, sizeof slot.value)) return false;
    slot.location = location;
    if (!isPresent(*vmi, slot.value)) return false;

    const addr_t offsetMask = (addr_t{1} << shift) - 1;
    const bool isLarge = shift > kPageShift && shift < kTopShift && (slot.value & kLargePage);
    if (isLarge || shift == kPageShift) {
      info.size = static_cast<page_size_t>(offsetMask + 1);
      info.paddr = (slot.value & kFrameMask & ~offsetMask) | (va & offsetMask);
      return true;
    }
    table = slot.value & kFrameMask;
  }
}

page_mode_t modeOf(const x86_registers_t &registers) {
  if (!(registers.cr0 & kCr0Paging)) return VMI_PM_NONE;
  if (!(registers.cr4 & kCr4Pae)) return VMI_PM_LEGACY;
  return registers.msr_efer & kEferLongMode ? VMI_PM_IA32E : VMI_PM_PAE;
}

}  // namespace

bool translate(vmi_instance_t vmi, page_mode_t mode, addr_t root, addr_t va, addr_t &pa) {
  if (mode != VMI_PM_IA32E) return false;
  if (const auto known = vmi->translations.find(root, va)) {
    uint8_t byte;
    if (readWithinPage(vmi, *known, &byte, sizeof byte)) {
      pa = *known;
      return true;
    }
    vmi->translations.drop(root, va);
  }
  page_info_t info;
  if (!walk(vmi, root, va, info)) return false;
  vmi->translations.insert(root, va, info.paddr);
  pa = info.paddr;
  return true;
}

}  // namespace vmi

using namespace vmi;

page_mode_t vmi_init_paging(vmi_instance_t vmi, uint64_t flags) {
  if (vmi == nullptr) return VMI_PM_UNKNOWN;
  vmi->pageMode = VMI_PM_UNKNOWN;
  registers_t registers;
  if (vmi_get_vcpuregs(vmi, &registers, 0) != VMI_SUCCESS) return VMI_PM_UNKNOWN;
  vmi->pageMode = modeOf(registers.x86);
  // Asked for once, they stay asked for.
  if (flags & VMI_PM_INITFLAG_TRANSITION_PAGES) vmi->transitionPages = true;
  return vmi->pageMode;
}

status_t vmi_pagetable_lookup_extended(vmi_instance_t vmi, addr_t pt, addr_t vaddr, page_info_t *info) {
  if (vmi == nullptr || info == nullptr || vmi->pageMode != VMI_PM_IA32E) return VMI_FAILURE;
  if (!walk(vmi, pt, vaddr, *info)) return VMI_FAILURE;
  vmi->translations.insert(pt, vaddr, info->paddr);
  return VMI_SUCCESS;
}

status_t vmi_pagetable_lookup(vmi_instance_t vmi, addr_t pt, addr_t vaddr, addr_t *paddr) {
  if (vmi == nullptr || paddr == nullptr) return VMI_FAILURE;
  *paddr = 0;
  return translate(vmi, vmi->pageMode, pt, vaddr, *paddr) ? VMI_SUCCESS : VMI_FAILURE;
}

void vmi_v2pcache_flush(vmi_instance_t vmi, addr_t pt) {
  constexpr addr_t kEveryPageTable = ~addr_t{0};
  if (vmi == nullptr) return;
  if (pt == kEveryPageTable)
    vmi->translations.clear();
  else
    vmi->translations.drop(pt);
}

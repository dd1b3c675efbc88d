#include "memory.h"

#include <algorithm>
#include <cstring>

#include "instance.h"
#include "paging.h"

namespace vmi {
namespace {

bool writeWithinPage(vmi_instance &vmi, addr_t pa, const void *from, size_t size) {
  if (!vmi.writeWithinPage(pa, from, size)) return false;
  vmi.pages.drop(pa >> kPageShift);
  return true;
}

/** Physical addresses as they are, virtual ones translated. */
bool resolve(vmi_instance_t vmi, const access_context_t &context, addr_t address, addr_t &pa) {
  switch (context.tm) {
    case VMI_TM_NONE:
      pa = address;
      return true;
    case VMI_TM_PROCESS_DTB:
      return context.npm == VMI_PM_NONE &&
             translate(vmi, context.pm == VMI_PM_NONE ? vmi->pageMode : context.pm, context.pt, address, pa);
    default:
      return false;
  }
}

/** Has `transfer(pa, offset, size)` move `count` bytes, page by page, and counts what it moved. */
template <typename Transfer>
status_t eachPage(vmi_instance_t vmi, const access_context_t *context, size_t count, const void *buffer, size_t *done,
                  Transfer transfer) {
  size_t moved = 0;
  if (vmi != nullptr && context != nullptr && buffer != nullptr) {
    while (moved < count) {
      const addr_t address = context->addr + moved;
      const size_t piece = std::min<size_t>(count - moved, kPageSize - (address & kPageOffsetMask));
      addr_t pa;
      if (!resolve(vmi, *context, address, pa) || !transfer(pa, moved, piece)) break;
      moved += piece;
    }
  }
  if (done != nullptr) *done = moved;
  return vmi != nullptr && context != nullptr && buffer != nullptr && moved == count ? VMI_SUCCESS : VMI_FAILURE;
}

access_context_t physical(addr_t pa) {
  access_context_t context{};
  context.version = ACCESS_CONTEXT_VERSION;
  context.tm = VMI_TM_NONE;
  context.addr = pa;
  return context;
}

}  // namespace

bool readWithinPage(vmi_instance_t vmi, addr_t pa, void *to, size_t size) {
  const addr_t gfn = pa >> kPageShift;
  if (gfn >= vmi->maxPhysicalAddress >> kPageShift) return false;
  const Page *page = vmi->pages.get(gfn, [vmi](addr_t wanted) { return vmi->fetchPage(wanted); });
  if (page == nullptr) return false;
  memcpy(to, page->data() + (pa & kPageOffsetMask), size);
  return true;
}

}  // namespace vmi

using namespace vmi;

status_t vmi_read(vmi_instance_t vmi, const access_context_t *ctx, size_t count, void *buf, size_t *done) {
  return eachPage(vmi, ctx, count, buf, done, [=](addr_t pa, size_t offset, size_t size) {
    return readWithinPage(vmi, pa, static_cast<uint8_t *>(buf) + offset, size);
  });
}

status_t vmi_write(vmi_instance_t vmi, const access_context_t *ctx, size_t count, void *buf, size_t *done) {
  return eachPage(vmi, ctx, count, buf, done, [=](addr_t pa, size_t offset, size_t size) {
    return writeWithinPage(*vmi, pa, static_cast<const uint8_t *>(buf) + offset, size);
  });
}

status_t vmi_read_pa(vmi_instance_t vmi, addr_t paddr, size_t count, void *buf, size_t *done) {
  const access_context_t context = physical(paddr);
  return vmi_read(vmi, &context, count, buf, done);
}

status_t vmi_write_pa(vmi_instance_t vmi, addr_t paddr, size_t count, void *buf, size_t *done) {
  const access_context_t context = physical(paddr);
  return vmi_write(vmi, &context, count, buf, done);
}

unsigned int vmi_get_num_vcpus(vmi_instance_t vmi) { return vmi == nullptr ? 0 : vmi->vcpuCount; }

uint64_t vmi_get_memsize(vmi_instance_t vmi) { return vmi_get_max_physical_address(vmi); }

void vmi_pagecache_flush(vmi_instance_t vmi) {
  if (vmi != nullptr) vmi->pages.clear();
}

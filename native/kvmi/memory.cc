#include "memory.h"

#include <algorithm>
#include <cstring>

#include "instance.h"

namespace kvmi {
namespace {

bool isPhysicalMemory(const vmi_instance &vmi, addr_t pa, size_t size) {
  return pa < vmi.maxPhysicalAddress && size <= vmi.maxPhysicalAddress - pa;
}

/** As libvmi does, whole pages are asked for, however little of them is needed. */
bool fetchPage(vmi_instance &vmi, addr_t gfn, Page &page) {
  const wire::PhysicalRange range{gfn << kPageShift, kPageSize};
  if (!isPhysicalMemory(vmi, range.gpa, range.size)) return false;
  return vmi.connection->request(wire::MessageId::kReadPhysical, {range}, page.data(), page.size());
}

bool writeWithinPage(vmi_instance &vmi, addr_t pa, const void *from, size_t size) {
  if (!isPhysicalMemory(vmi, pa, size)) return false;
  vmi.pages.drop(pa >> kPageShift);
  return vmi.connection->request(wire::MessageId::kWritePhysical, {wire::PhysicalRange{pa, size}, Bytes(from, size)});
}

/** Physical addresses as they are, virtual ones translated. */
bool resolve(vmi_instance_t vmi, const access_context_t &context, addr_t address, addr_t &pa) {
  switch (context.tm) {
    case VMI_TM_NONE:
      pa = address;
      return true;
    case VMI_TM_PROCESS_DTB:
      return context.npm == VMI_PM_NONE && (context.pm == VMI_PM_NONE || context.pm == vmi->pageMode) &&
             vmi_pagetable_lookup(vmi, context.pt, address, &pa) == VMI_SUCCESS;
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
  if (!vmi->connection->alive()) return false;
  const addr_t gfn = pa >> kPageShift;
  const addr_t offset = pa & kPageOffsetMask;
  if (const Page *cached = vmi->pages.find(gfn)) {
    memcpy(to, &(*cached)[offset], size);
    return true;
  }
  Page page;
  if (!fetchPage(*vmi, gfn, page)) return false;
  if (vmi->standsStill()) vmi->pages.insert(gfn, page);
  memcpy(to, &page[offset], size);
  return true;
}

}  // namespace kvmi

using namespace kvmi;

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

void vmi_pagecache_flush(vmi_instance_t vmi) {
  if (vmi != nullptr) vmi->pages.clear();
}

void vmi_v2pcache_flush(vmi_instance_t, addr_t) {
  // Translations are not cached but for the pages of the tables, and these are not kept while the guest runs.
}

#include "instance.h"

namespace kvmi {

std::optional<Page> Instance::fetchPage(addr_t gfn) {
  const wire::PhysicalRange range{gfn << kPageShift, kPageSize};
  std::optional<Page> page(std::in_place);
  if (!connection->request(wire::MessageId::kReadPhysical, {range}, page->data(), page->size())) page.reset();
  return page;
}

bool Instance::writeWithinPage(addr_t pa, const void *from, size_t size) {
  const wire::PhysicalRange range{pa, size};
  return connection->request(wire::MessageId::kWritePhysical, {range, Bytes(from, size)});
}

bool Instance::trap(addr_t gfn, vmi_mem_access_t accesses, uint16_t view) {
  wire::SetPageAccess command{};
  command.view = view;
  command.count = 1;
  wire::PageAccess page{};
  page.gpa = gfn << kPageShift;
  page.access = wire::kAccessAll & ~(accesses >> 1);
  return connection->request(wire::MessageId::kSetPageAccess, {command, page});
}

bool Instance::setSingleStep(uint32_t vcpu, bool enable) {
  wire::VcpuHeader header{};
  header.vcpu = static_cast<uint16_t>(vcpu);
  wire::ControlSingleStep command{};
  command.enable = enable;
  const bool done = connection->request(wire::MessageId::kControlSingleStep, {header, command});
  bool &singleStepping = vcpus[vcpu].singleStepping;
  singleStepping = done ? enable : singleStepping && !enable;
  return done;
}

}  // namespace kvmi

#include "registers.h"

#include "../vmi/registers.h"
#include "instance.h"

namespace kvmi {
namespace {

/** The MSRs that libvmi asks for, in its order. */
constexpr uint32_t kMsrIndexes[] = {
    0x174, 0x175, 0x176,                         // SYSENTER_CS, ESP, EIP
    0xc0000080, 0xc0000081, 0xc0000082, 0xc0000083,  // EFER, STAR, LSTAR, CSTAR
};
constexpr size_t kMsrCount = sizeof kMsrIndexes / sizeof *kMsrIndexes;

uint64_t attributesOf(const wire::Segment &segment) {
  return (segment.type & 15u) | (segment.s & 1u) << 4 | (segment.dpl & 3u) << 5 | (segment.present & 1u) << 7 |
         (segment.avl & 1u) << 8 | (segment.l & 1u) << 9 | (segment.db & 1u) << 10 | (segment.g & 1u) << 11;
}

}  // namespace

x86_registers_t fromWire(const wire::Registers &general, const wire::SpecialRegisters &special) {
  x86_registers_t to{};
  copyGeneral(to, general);
  to.cr0 = special.cr0;
  to.cr2 = special.cr2;
  to.cr3 = special.cr3;
  to.cr4 = special.cr4;
#define KVMI_SEGMENT(name)                       \
  to.name##_base = special.name.base;            \
  to.name##_limit = special.name.limit;          \
  to.name##_sel = special.name.selector;         \
  to.name##_arbytes = attributesOf(special.name)
  KVMI_SEGMENT(cs);
  KVMI_SEGMENT(ds);
  KVMI_SEGMENT(es);
  KVMI_SEGMENT(fs);
  KVMI_SEGMENT(gs);
  KVMI_SEGMENT(ss);
  KVMI_SEGMENT(tr);
  KVMI_SEGMENT(ldt);
#undef KVMI_SEGMENT
  return to;
}

}  // namespace kvmi

using namespace kvmi;

status_t vmi_get_vcpuregs(vmi_instance_t vmi, registers_t *regs, unsigned long vcpu) {
  if (vmi == nullptr || regs == nullptr || vcpu > UINT16_MAX) return VMI_FAILURE;
  // Which vCPUs there are is left to the hypervisor, as libvmi leaves it.
  wire::VcpuHeader header{};
  header.vcpu = static_cast<uint16_t>(vcpu);
  wire::GetRegisters command{};
  command.msrCount = kMsrCount;
  struct {
    wire::RegistersReply fixed;
    wire::Msr msrs[kMsrCount];
  } reply;
  Connection &connection = *kvmiOf(vmi).connection;
  if (!connection.request(wire::MessageId::kGetRegisters, {header, command, kMsrIndexes}, &reply, sizeof reply))
    return VMI_FAILURE;

  x86_registers_t &x86 = regs->x86;
  const wire::SpecialRegisters &special = reply.fixed.special;
  x86 = fromWire(reply.fixed.general, special);
  uint64_t *const msrs[kMsrCount] = {&x86.sysenter_cs, &x86.sysenter_esp, &x86.sysenter_eip, &x86.msr_efer,
                                     &x86.msr_star,    &x86.msr_lstar,    &x86.msr_cstar};
  for (size_t i = 0; i < kMsrCount; i++) *msrs[i] = reply.msrs[i].value;
  x86.gdtr_base = special.gdt.base;
  x86.gdtr_limit = special.gdt.limit;
  x86.idtr_base = special.idt.base;
  x86.idtr_limit = special.idt.limit;
  return VMI_SUCCESS;
}

status_t vmi_set_vcpuregs(vmi_instance_t vmi, registers_t *regs, unsigned long vcpu) {
  if (vmi == nullptr || regs == nullptr || vcpu > UINT16_MAX) return VMI_FAILURE;
  wire::VcpuHeader header{};
  header.vcpu = static_cast<uint16_t>(vcpu);
  wire::Registers general{};
  copyGeneral(general, regs->x86);
  const bool done = kvmiOf(vmi).connection->request(wire::MessageId::kSetRegisters, {header, general});
  return done ? VMI_SUCCESS : VMI_FAILURE;
}

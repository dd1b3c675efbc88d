#include "registers.h"

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

wire::Registers toWire(const x86_registers_t &from) {
  wire::Registers to{};
  to.rax = from.rax;
  to.rbx = from.rbx;
  to.rcx = from.rcx;
  to.rdx = from.rdx;
  to.rsi = from.rsi;
  to.rdi = from.rdi;
  to.rsp = from.rsp;
  to.rbp = from.rbp;
  to.r8 = from.r8;
  to.r9 = from.r9;
  to.r10 = from.r10;
  to.r11 = from.r11;
  to.r12 = from.r12;
  to.r13 = from.r13;
  to.r14 = from.r14;
  to.r15 = from.r15;
  to.rip = from.rip;
  to.rflags = from.rflags;
  return to;
}

/** Where a numbered register is kept; null for one that KVMI does not tell. */
uint64_t x86_registers_t::*readable(reg_t reg) {
  using R = x86_registers_t;
  switch (reg) {
    case RAX: return &R::rax;
    case RBX: return &R::rbx;
    case RCX: return &R::rcx;
    case RDX: return &R::rdx;
    case RBP: return &R::rbp;
    case RSI: return &R::rsi;
    case RDI: return &R::rdi;
    case RSP: return &R::rsp;
    case RIP: return &R::rip;
    case RFLAGS: return &R::rflags;
    case R8: return &R::r8;
    case R9: return &R::r9;
    case R10: return &R::r10;
    case R11: return &R::r11;
    case R12: return &R::r12;
    case R13: return &R::r13;
    case R14: return &R::r14;
    case R15: return &R::r15;
    case CR0: return &R::cr0;
    case CR2: return &R::cr2;
    case CR3: return &R::cr3;
    case CR4: return &R::cr4;
    case FS_BASE: return &R::fs_base;
    case GS_BASE: return &R::gs_base;
    case IDTR_BASE: return &R::idtr_base;
    case IDTR_LIMIT: return &R::idtr_limit;
    case GDTR_BASE: return &R::gdtr_base;
    case GDTR_LIMIT: return &R::gdtr_limit;
    case SYSENTER_CS: return &R::sysenter_cs;
    case SYSENTER_ESP: return &R::sysenter_esp;
    case SYSENTER_EIP: return &R::sysenter_eip;
    case MSR_EFER: return &R::msr_efer;
    case MSR_STAR: return &R::msr_star;
    case MSR_LSTAR: return &R::msr_lstar;
    case MSR_CSTAR: return &R::msr_cstar;
    default: return nullptr;
  }
}

}  // namespace

x86_registers_t fromWire(const wire::Registers &general, const wire::SpecialRegisters &special) {
  x86_registers_t to{};
  to.rax = general.rax;
  to.rbx = general.rbx;
  to.rcx = general.rcx;
  to.rdx = general.rdx;
  to.rsi = general.rsi;
  to.rdi = general.rdi;
  to.rsp = general.rsp;
  to.rbp = general.rbp;
  to.r8 = general.r8;
  to.r9 = general.r9;
  to.r10 = general.r10;
  to.r11 = general.r11;
  to.r12 = general.r12;
  to.r13 = general.r13;
  to.r14 = general.r14;
  to.r15 = general.r15;
  to.rip = general.rip;
  to.rflags = general.rflags;
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
  if (!vmi->connection->request(wire::MessageId::kGetRegisters, {header, command, kMsrIndexes}, &reply, sizeof reply))
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
  return vmi->connection->request(wire::MessageId::kSetRegisters, {header, toWire(regs->x86)}) ? VMI_SUCCESS
                                                                                               : VMI_FAILURE;
}

status_t vmi_get_vcpureg(vmi_instance_t vmi, uint64_t *value, reg_t reg, unsigned long vcpu) {
  const auto member = readable(reg);
  registers_t registers;
  if (value == nullptr || member == nullptr || vmi_get_vcpuregs(vmi, &registers, vcpu) != VMI_SUCCESS)
    return VMI_FAILURE;
  *value = registers.x86.*member;
  return VMI_SUCCESS;
}

status_t vmi_set_vcpureg(vmi_instance_t vmi, uint64_t value, reg_t reg, unsigned long vcpu) {
  registers_t registers;
  if (reg > R15 || vmi_get_vcpuregs(vmi, &registers, vcpu) != VMI_SUCCESS) return VMI_FAILURE;
  registers.x86.*readable(reg) = value;
  return vmi_set_vcpuregs(vmi, &registers, vcpu);
}

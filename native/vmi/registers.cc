#include <libvmi/libvmi.h>

namespace {

/** Where a numbered register is kept; null for one that libvmi has and this library has not. */
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

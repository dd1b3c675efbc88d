#include "registers.h"

#include <cerrno>
#include <cstring>
#include <vector>

#include "../vmi/log.h"
#include "../vmi/registers.h"
#include "instance.h"

namespace xen {
namespace {

/** Any guest's saved state is far smaller. */
constexpr int kMaxStateSize = 64 * 1024 * 1024;
/** The record of a vCPU's extended state; Xen's public headers do not name it. */
constexpr uint16_t kXsaveRecord = 16;

template <typename To, typename From>
void copyControl(To &to, const From &from) {
  to.cr0 = from.cr0;
  to.cr2 = from.cr2;
  to.cr3 = from.cr3;
  to.cr4 = from.cr4;
  to.dr6 = from.dr6;
  to.dr7 = from.dr7;
  to.sysenter_cs = from.sysenter_cs;
  to.sysenter_esp = from.sysenter_esp;
  to.sysenter_eip = from.sysenter_eip;
  to.msr_efer = from.msr_efer;
  to.msr_star = from.msr_star;
  to.msr_lstar = from.msr_lstar;
  to.shadow_gs = from.shadow_gs;
  to.gdtr_base = from.gdtr_base;
  to.gdtr_limit = from.gdtr_limit;
}

x86_registers_t fromState(const hvm_hw_cpu &from) {
  x86_registers_t to{};
  copyGeneral(to, from);
  copyControl(to, from);
  to.msr_cstar = from.msr_cstar;
  to.idtr_base = from.idtr_base;
  to.idtr_limit = from.idtr_limit;
#define XEN_SEGMENT(name, theirs)             \
  to.name##_base = from.theirs##_base;        \
  to.name##_limit = from.theirs##_limit;      \
  to.name##_sel = from.theirs##_sel;          \
  to.name##_arbytes = from.theirs##_arbytes
  XEN_SEGMENT(cs, cs);
  XEN_SEGMENT(ds, ds);
  XEN_SEGMENT(es, es);
  XEN_SEGMENT(fs, fs);
  XEN_SEGMENT(gs, gs);
  XEN_SEGMENT(ss, ss);
  XEN_SEGMENT(tr, tr);
  XEN_SEGMENT(ldt, ldtr);
#undef XEN_SEGMENT
  return to;
}

/** A vCPU that the guest has not started has no state. */
bool isDown(const Instance &vmi, uint32_t vcpu) {
  xc_vcpuinfo_t info{};
  return xc_vcpu_getinfo(vmi.control.get(), vmi.domain, vcpu, &info) == 0 && !info.online;
}

/** The saved state of the whole guest: records behind their descriptors. */
std::optional<std::vector<uint8_t>> loadState(const Instance &vmi) {
  const int size = xc_domain_hvm_getcontext(vmi.control.get(), vmi.domain, nullptr, 0);
  if (size <= 0 || size > kMaxStateSize) return std::nullopt;
  std::vector<uint8_t> state(static_cast<size_t>(size));
  const int filled = xc_domain_hvm_getcontext(vmi.control.get(), vmi.domain, state.data(), size);
  if (filled <= 0 || filled > size) return std::nullopt;
  state.resize(static_cast<size_t>(filled));
  return state;
}

/**
 * Of `state` what makes up the vCPUs, with the general registers of one of them replaced. All of them have to be in
 * it, for Xen stops the ones that are not; devices and timers stay as they are. Nothing if that vCPU has no state.
 */
std::optional<std::vector<uint8_t>> replaceGeneral(const std::vector<uint8_t> &state, uint32_t vcpu,
                                                   const x86_registers_t &registers) {
  std::vector<uint8_t> result;
  bool found = false;
  for (size_t at = 0; state.size() - at >= sizeof(hvm_save_descriptor);) {
    hvm_save_descriptor descriptor;
    memcpy(&descriptor, &state[at], sizeof descriptor);
    const size_t size = sizeof descriptor + descriptor.length;
    if (size > state.size() - at) return std::nullopt;
    const uint16_t code = descriptor.typecode;
    if (code == HVM_SAVE_CODE(HEADER) || code == HVM_SAVE_CODE(CPU) || code == kXsaveRecord ||
        code == HVM_SAVE_CODE(END))
      result.insert(result.end(), &state[at], &state[at] + size);
    if (code == HVM_SAVE_CODE(END)) break;
    if (code == HVM_SAVE_CODE(CPU) && descriptor.instance == vcpu && descriptor.length == sizeof(hvm_hw_cpu)) {
      uint8_t *const record = result.data() + result.size() - sizeof(hvm_hw_cpu);
      hvm_hw_cpu cpu;
      memcpy(&cpu, record, sizeof cpu);
      copyGeneral(cpu, registers);
      memcpy(record, &cpu, sizeof cpu);
      found = true;
    }
    at += size;
  }
  if (!found) return std::nullopt;
  return result;
}

}  // namespace

x86_registers_t fromEvent(const vm_event_regs_x86 &from) {
  x86_registers_t to{};
  copyGeneral(to, from);
  copyControl(to, from);
  to.npt_base = from.npt_base;
  to.vmtrace_pos = from.vmtrace_pos;
#define XEN_SEGMENT(name)                \
  to.name##_base = from.name##_base;     \
  to.name##_limit = from.name.limit;     \
  to.name##_sel = from.name##_sel;       \
  to.name##_arbytes = from.name.ar
  XEN_SEGMENT(cs);
  XEN_SEGMENT(ds);
  XEN_SEGMENT(es);
  XEN_SEGMENT(fs);
  XEN_SEGMENT(gs);
  XEN_SEGMENT(ss);
#undef XEN_SEGMENT
  return to;
}

}  // namespace xen

using namespace xen;

status_t vmi_get_vcpuregs(vmi_instance_t vmi, registers_t *regs, unsigned long vcpu) {
  if (vmi == nullptr || regs == nullptr || !vmi->hasVcpu(vcpu)) return VMI_FAILURE;
  const Instance &xen = xenOf(vmi);
  hvm_hw_cpu cpu{};
  const int failed = xc_domain_hvm_getcontext_partial(xen.control.get(), xen.domain, HVM_SAVE_CODE(CPU),
                                                      static_cast<uint16_t>(vcpu), &cpu, sizeof cpu);
  if (failed && !isDown(xen, static_cast<uint32_t>(vcpu))) return VMI_FAILURE;
  regs->x86 = fromState(cpu);
  return VMI_SUCCESS;
}

status_t vmi_set_vcpuregs(vmi_instance_t vmi, registers_t *regs, unsigned long vcpu) {
  if (vmi == nullptr || regs == nullptr || !vmi->hasVcpu(vcpu)) return VMI_FAILURE;
  Instance &xen = xenOf(vmi);
  if (!xen.pause()) return VMI_FAILURE;
  const auto state = loadState(xen);
  auto changed = state ? replaceGeneral(*state, static_cast<uint32_t>(vcpu), regs->x86) : std::nullopt;
  const bool done = changed && xc_domain_hvm_setcontext(xen.control.get(), xen.domain, changed->data(),
                                                        static_cast<uint32_t>(changed->size())) == 0;
  if (!done) complain("the registers of vCPU %lu cannot be set: %s", vcpu, changed ? strerror(errno) : "it has no state");
  return xen.resume() && done ? VMI_SUCCESS : VMI_FAILURE;
}

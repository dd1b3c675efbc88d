#pragma once

namespace vmi {

/** RAX to R15, RIP and RFLAGS: what can be set. KVM's and Xen's structures name them as libvmi's does. */
template <typename To, typename From>
void copyGeneral(To &to, const From &from) {
  to.rax = from.rax;
  to.rcx = from.rcx;
  to.rdx = from.rdx;
  to.rbx = from.rbx;
  to.rsp = from.rsp;
  to.rbp = from.rbp;
  to.rsi = from.rsi;
  to.rdi = from.rdi;
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
}

}  // namespace vmi

# The start-up page of a Xen PVH domain: brings each processor to the kernel's entry point, as platform/embedded.s
# describes it, with its local APIC in x2APIC mode.
.intel_syntax noprefix
.include "platform/pvh.inc"

.set IA32_APIC_BASE, 0x1b
.set APIC_X2APIC_MODE, 0xc00
.set IA32_EFER, 0xc0000080
.set CR0_PE, 1

.set CODE_32, 0x08
.set CODE_64, 0x10
.set DATA, 0x18

    .text
Start:
# A start-up IPI comes here, in real mode with IP = 0 and this page as CS.
    .code16
    cli
    mov     ax, cs
    mov     ds, ax
    lgdt    [Descriptors - Start]
    mov     eax, cr0
    or      al, CR0_PE
    mov     cr0, eax
    .byte   0x66, 0xea                          # jmp CODE_32:StartFurtherProcessor
    .long   StartFurtherProcessor
    .word   CODE_32

# The domain begins here, on its first processor: flat 32-bit segments, no paging (Xen's PVH boot protocol).
    .org    START_DOMAIN_ENTRY
    .code32
    cli
    cld
    lgdt    [Descriptors]
    xor     esi, esi
    jmp     StartProcessor

# The processors are numbered in the order in which they come.
StartFurtherProcessor:
    mov     eax, DATA
    mov     ds, eax
    mov     esi, 1
    lock xadd [ProcessorsStarted], esi
    cmp     esi, [START_ADDRESS + START_PROCESSORS]
    jae     Halt

# ESI = number of the processor.
StartProcessor:
    mov     ecx, IA32_APIC_BASE
    rdmsr
    or      eax, APIC_X2APIC_MODE
    wrmsr
    mov     eax, [START_ADDRESS + START_CR4]
    mov     cr4, eax
    mov     eax, [START_ADDRESS + START_CR3]
    mov     cr3, eax
    mov     ecx, IA32_EFER
    mov     eax, [START_ADDRESS + START_EFER]
    xor     edx, edx
    wrmsr
    mov     eax, [START_ADDRESS + START_CR0]
    mov     cr0, eax
    .byte   0xea                                # jmp CODE_64:EnterKernel
    .long   EnterKernel
    .word   CODE_64

    .code64
EnterKernel:
    mov     eax, DATA
    mov     ss, eax
    lea     rax, [rip + Start]
    mov     rcx, [rax + START_BOOT_BLOCK]
    mov     edx, esi
    mov     rsp, [rax + START_STACKS + rdx * 8]
    jmp     [rax + START_RIP]

# One more processor than the kernel has been told of.
    .code32
Halt:
    hlt
    jmp     Halt

    .balign 8
ProcessorsStarted:
    .long   1
Descriptors:
    .word   DescriptorsEnd - DescriptorTable - 1
    .long   DescriptorTable
    .balign 8
DescriptorTable:
    .quad   0
    .quad   0x00cf9b000000ffff                  # code, 32 bit
    .quad   0x00209b0000000000                  # code, 64 bit
    .quad   0x00cf93000000ffff                  # data
DescriptorsEnd:
# The parameters, filled in.
    .org    START_CR3
    .org    0x1000

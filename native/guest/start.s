# From the entry point to the idle loops.
.include "guest.inc"

.set IA32_EFER, 0xc0000080
.set IA32_STAR, 0xc0000081
.set IA32_LSTAR, 0xc0000082
.set IA32_FMASK, 0xc0000084
.set IA32_GS_BASE, 0xc0000101
.set IA32_KERNEL_GS_BASE, 0xc0000102
.set EFER_SCE, 1
# SYSCALL clears TF, IF, DF, IOPL, NT and AC.
.set SYSCALL_MASK, 0x47700

.set GDT_BYTES, 0x60
.set IDT_BYTES, 0x1000
.set GATE_INTERRUPT, 0x8e00
.set EXCEPTION_VECTORS, 32
.set IDLE_PROCESS_ID, 0
.set SYSTEM_PROCESS_ID, 4
.set USER_PROCESS_ID, 0x1a4

code_section INIT

# The entry point of every processor: see platform/ for what it finds. The first one sets up the kernel, the others
# may come at any time.
export KiSystemStartup
frame_function KiSystemStartup, 0
    cli
    cld
    mov     r12, rcx
    mov     r13, rdx
    test    edx, edx
    jnz     .Lwait_for_kernel
    call    KiInitializeKernel
    mov     dword ptr [rip + KiKernelReady], 1
    call    [rip + __imp_HalStartProcessors]
.Lwait_for_kernel:
    pause
    cmp     dword ptr [rip + KiKernelReady], 0
    je      .Lwait_for_kernel
    lea     rax, [rip + KiProcessorBlock]
    mov     rcx, [rax + r13 * 8]
    call    KiLoadProcessor
    call    [rip + __imp_HalStartClock]
    mov     rsp, gs:[PRCB + _KPRCB.RspBase]
    sub     rsp, 0x20
    jmp     KiIdleLoop
end_frame_function

# RCX = KPRCB: makes this processor use its own tables.
frame_function KiLoadProcessor, 0x10, rbx
    lea     rbx, [rcx - PRCB]
    mov     word ptr [rsp], GDT_BYTES - 1
    mov     rax, [rbx + _KPCR.GdtBase]
    mov     [rsp + 2], rax
    lgdt    [rsp]
    mov     word ptr [rsp], IDT_BYTES - 1
    mov     rax, [rbx + _KPCR.IdtBase]
    mov     [rsp + 2], rax
    lidt    [rsp]
    push    KGDT64_R0_CODE
    lea     rax, [rip + .Lnew_code_segment]
    push    rax
    .byte   0x48, 0xcb                          # retfq
.Lnew_code_segment:
    mov     eax, KGDT64_R0_DATA
    mov     ss, eax
    mov     eax, KGDT64_R3_DATA | RPL_USER
    mov     ds, eax
    mov     es, eax
    xor     eax, eax
    mov     fs, eax
    mov     gs, eax
    mov     eax, KGDT64_SYS_TSS
    ltr     ax
    mov     ecx, IA32_GS_BASE
    mov     rdx, rbx
    call    .Lwrite_msr
    mov     ecx, IA32_KERNEL_GS_BASE
    xor     edx, edx
    call    .Lwrite_msr
    mov     ecx, IA32_STAR
    mov     rdx, (((KGDT64_R3_CMCODE | RPL_USER) << 16) | KGDT64_R0_CODE) << 32
    call    .Lwrite_msr
    mov     ecx, IA32_LSTAR
    lea     rdx, [rip + KiSystemCall64]
    call    .Lwrite_msr
    mov     ecx, IA32_FMASK
    mov     edx, SYSCALL_MASK
    call    .Lwrite_msr
    mov     ecx, IA32_EFER
    rdmsr
    or      eax, EFER_SCE
    wrmsr
    leave_frame
    ret
.Lwrite_msr:
    mov     eax, edx
    shr     rdx, 32
    wrmsr
    ret
end_frame_function

# RCX = boot block. Runs on the first processor, before any other does anything.
frame_function KiInitializeKernel, 0x28, rbx, rsi, rdi, r12
    mov     rbx, rcx
    mov     [rip + KiBootBlock], rcx
    mov     rax, [rbx + BOOT_POOL]
    mov     [rip + MmPoolNext], rax
    mov     eax, [rbx + BOOT_PROCESSORS]
    mov     [rip + KeNumberProcessors], eax
    imul    rax, rax, STACK_SLOT                # the slots of the stacks we run on
    add     rax, [rbx + BOOT_STACKS]
    mov     [rip + MmStackNext], rax
    mov     eax, [rbx + BOOT_LOW_ALIAS]
    mov     [rip + WlLowAlias], eax
    mov     rcx, rbx
    call    MiInitializeLoadedModuleList
    mov     rcx, rbx
    call    WlKeepReferenceImages
    call    KiBuildInterruptTable

    lea     rcx, [rip + IdleProcessName]
    mov     edx, IDLE_PROCESS_ID
    mov     r8, [rbx + BOOT_SYSTEM_CR3]
    call    PsCreateProcess
    mov     [rip + PsIdleProcess], rax
    lea     rcx, [rip + SystemProcessName]
    mov     edx, SYSTEM_PROCESS_ID
    mov     r8, [rbx + BOOT_SYSTEM_CR3]
    call    PsCreateProcess
    mov     [rip + PsInitialSystemProcess], rax
    lea     rcx, [rip + UserProcessName]
    mov     edx, USER_PROCESS_ID
    mov     r8, [rbx + BOOT_USER_CR3]
    call    PsCreateProcess
    mov     [rip + WlUserProcess], rax

    xor     esi, esi
.Lnext_processor:
    mov     ecx, esi
    call    KiCreateProcessor
    inc     esi
    cmp     esi, [rip + KeNumberProcessors]
    jb      .Lnext_processor

    call    WlCreateWorkload
    lea     rsi, [rip + BootMessage]
    call    [rip + __imp_HalDisplayString]
    lea     rax, [rip + WlReport]
    mov     [rbx + BOOT_REPORT], rax
    leave_frame
    ret
end_frame_function

# ECX = bytes; RAX = zeroed memory that is never given back.
export ExAllocatePool
function ExAllocatePool
    mov     eax, ecx
    add     rax, POOL_ALIGNMENT - 1
    and     rax, -POOL_ALIGNMENT
    lock xadd [rip + MmPoolNext], rax
    ret

# RAX = the end (StackBase) of a new kernel stack.
function MmCreateKernelStack
    mov     eax, STACK_SLOT
    lock xadd [rip + MmStackNext], rax
    add     rax, STACK_SLOT
    ret

# One interrupt table for all processors: traps, the clock, and a stop for everything else.
frame_function KiBuildInterruptTable, 0, rdi, rsi
    mov     ecx, IDT_BYTES
    call    ExAllocatePool
    mov     [rip + KiInterruptTable], rax
    mov     rdi, rax
    xor     esi, esi
.Lnext_gate:
    lea     rdx, [rip + KiTrapStubs]
    mov     eax, esi
    shl     eax, 4                              # stubs are 16 bytes apart
    add     rdx, rax
    cmp     esi, CLOCK_VECTOR
    jne     .Lgate_address_known
    lea     rdx, [rip + KiClockInterrupt]
.Lgate_address_known:
    lea     rax, [rip + KiInterruptStacks]
    xor     ecx, ecx
    cmp     esi, EXCEPTION_VECTORS
    jae     .Lgate_stack_known
    movzx   ecx, byte ptr [rax + rsi]
.Lgate_stack_known:
    mov     [rdi], dx
    mov     word ptr [rdi + 2], KGDT64_R0_CODE
    or      ecx, GATE_INTERRUPT
    mov     [rdi + 4], cx
    shr     rdx, 16
    mov     [rdi + 6], dx
    shr     rdx, 16
    mov     [rdi + 8], edx
    add     rdi, 16
    inc     esi
    cmp     esi, 256
    jb      .Lnext_gate
    leave_frame
    ret
end_frame_function

# ECX = index: creates the processor's KPCR, descriptor table, TSS, stacks and idle thread.
frame_function KiCreateProcessor, 0x20, rbx, rsi, rdi, r12, r13
    mov     r12d, ecx
    mov     ecx, _KPCR.size
    call    ExAllocatePool
    mov     rbx, rax
    lea     rsi, [rbx + PRCB]
    lea     rax, [rip + KiProcessorBlock]
    mov     [rax + r12 * 8], rsi
    mov     [rbx + _KPCR.Self], rbx
    mov     [rbx + _KPCR.CurrentPrcb], rsi
    mov     word ptr [rbx + _KPCR.MajorVersion], 1
    mov     word ptr [rbx + _KPCR.MinorVersion], 1
    mov     byte ptr [rbx + _KPCR.Irql], DISPATCH_LEVEL
    mov     rax, [rip + KiInterruptTable]
    mov     [rbx + _KPCR.IdtBase], rax
    mov     [rsi + _KPRCB.Number], r12d
    lea     rax, [rsi + _KPRCB.DispatcherReadyListHead]
    mov     [rax], rax
    mov     [rax + 8], rax
    lea     rax, [rsi + _KPRCB.WaitListHead]
    mov     [rax], rax
    mov     [rax + 8], rax

    call    MmCreateKernelStack
    mov     [rsi + _KPRCB.DpcStack], rax
    call    MmCreateKernelStack
    mov     [rsi + _KPRCB.IsrStack], rax

    mov     ecx, _KTSS64.size
    call    ExAllocatePool
    mov     rdi, rax
    mov     [rbx + _KPCR.TssBase], rax
    mov     word ptr [rdi + _KTSS64.IoMapBase], _KTSS64.size
    mov     r13d, 1
.Lnext_interrupt_stack:
    call    MmCreateKernelStack
    mov     [rdi + _KTSS64.Ist + r13 * 8], rax
    inc     r13d
    cmp     r13d, 3
    jbe     .Lnext_interrupt_stack

    mov     ecx, GDT_BYTES
    call    ExAllocatePool
    mov     [rbx + _KPCR.GdtBase], rax
    mov     rdi, rax
    lea     rdx, [rip + KiDescriptors]
    mov     ecx, GDT_BYTES / 8
.Lnext_descriptor:
    mov     rax, [rdx]
    mov     [rdi], rax
    add     rdx, 8
    add     rdi, 8
    dec     ecx
    jnz     .Lnext_descriptor
    mov     rdi, [rbx + _KPCR.GdtBase]
    mov     rax, [rbx + _KPCR.TssBase]
    mov     word ptr [rdi + KGDT64_SYS_TSS], _KTSS64.size - 1
    mov     [rdi + KGDT64_SYS_TSS + 2], ax
    shr     rax, 16
    mov     [rdi + KGDT64_SYS_TSS + 4], al
    mov     byte ptr [rdi + KGDT64_SYS_TSS + 5], 0x89   # present, available 64-bit TSS
    mov     [rdi + KGDT64_SYS_TSS + 7], ah
    shr     rax, 16
    mov     [rdi + KGDT64_SYS_TSS + 8], eax

    mov     rcx, [rip + PsIdleProcess]
    lea     rdx, [rip + KiIdleLoop]
    xor     r8d, r8d
    mov     r9d, r12d
    call    PsCreateThreadObject
    mov     [rsi + _KPRCB.IdleThread], rax
    mov     [rsi + _KPRCB.CurrentThread], rax
    mov     byte ptr [rax + _KTHREAD.State], STATE_RUNNING
    mov     byte ptr [rax + _KTHREAD.Running], 1
    # The idle thread runs on the stack the processor started on.
    lea     rcx, [r12 + 1]
    imul    rcx, rcx, STACK_SLOT
    mov     rdx, [rip + KiBootBlock]
    add     rcx, [rdx + BOOT_STACKS]
    call    PsSetKernelStack
    mov     rdx, [rax + _KTHREAD.InitialStack]
    mov     [rsi + _KPRCB.RspBase], rdx
    mov     rdi, [rbx + _KPCR.TssBase]
    mov     [rdi + _KTSS64.Rsp0], rdx
    leave_frame
    ret
end_frame_function

# RCX = 15 characters of name, EDX = process id, R8 = CR3; RAX = EPROCESS.
frame_function PsCreateProcess, 0, rbx, rsi, rdi
    mov     rsi, rcx
    mov     edi, edx
    mov     ecx, _EPROCESS.size
    call    ExAllocatePool
    mov     rbx, rax
    mov     byte ptr [rbx + _DISPATCHER_HEADER.Type], 3     # ProcessObject
    mov     [rbx + _KPROCESS.DirectoryTableBase], r8
    mov     [rbx + _EPROCESS.UniqueProcessId], rdi
    lea     rax, [rbx + _KPROCESS.ThreadListHead]
    mov     [rax], rax
    mov     [rax + 8], rax
    lea     rax, [rbx + _EPROCESS.ThreadListHead]
    mov     [rax], rax
    mov     [rax + 8], rax
    lea     rcx, [rbx + _EPROCESS.ActiveProcessLinks]
    mov     [rcx], rcx
    mov     [rcx + 8], rcx
    test    edi, edi
    jz      .Lnot_in_the_list                   # the idle process never is
    lea     rdx, [rip + PsActiveProcessHead]
    call    KiInsertTailList
.Lnot_in_the_list:
    lea     rdi, [rbx + _EPROCESS.ImageFileName]
    mov     ecx, 15
    rep movsb
    mov     rax, rbx
    leave_frame
    ret
end_frame_function

# RCX = process, RDX = start routine, R8 = its argument, R9D = processor; RAX = the new thread, not yet ready and
# without a stack.
frame_function PsCreateThreadObject, 0, rbx, rsi, rdi, r12
    mov     rsi, rcx
    mov     rdi, rdx
    mov     ecx, _ETHREAD.size
    call    ExAllocatePool
    mov     rbx, rax
    mov     byte ptr [rbx + _DISPATCHER_HEADER.Type], 6     # ThreadObject
    mov     [rbx + _KTHREAD.Process], rsi
    mov     [rbx + _KTHREAD.ApcState + _KAPC_STATE.Process], rsi
    mov     [rbx + _KTHREAD.NextProcessor], r9d
    mov     byte ptr [rbx + _KTHREAD.State], STATE_INITIALIZED
    mov     byte ptr [rbx + _KTHREAD.QuantumReset], 1
    mov     [rbx + _ETHREAD.StartAddress], rdi
    mov     rax, [rsi + _EPROCESS.UniqueProcessId]
    mov     [rbx + _ETHREAD.Cid + _CLIENT_ID.UniqueProcess], rax
    add     qword ptr [rip + PsNextThreadId], 4
    mov     rax, [rip + PsNextThreadId]
    mov     [rbx + _ETHREAD.Cid + _CLIENT_ID.UniqueThread], rax
    inc     dword ptr [rsi + _EPROCESS.ActiveThreads]
    lea     rcx, [rbx + _KTHREAD.ThreadListEntry]
    lea     rdx, [rsi + _KPROCESS.ThreadListHead]
    call    KiInsertTailList
    lea     rcx, [rbx + _ETHREAD.ThreadListEntry]
    lea     rdx, [rsi + _EPROCESS.ThreadListHead]
    call    KiInsertTailList
    mov     rax, rbx
    leave_frame
    ret
end_frame_function

# RAX = thread, RCX = end of its kernel stack; keeps RAX.
function PsSetKernelStack
    mov     [rax + _KTHREAD.StackBase], rcx
    lea     rdx, [rcx - STACK_BYTES]
    mov     [rax + _KTHREAD.StackLimit], rdx
    sub     rcx, STACK_RESERVE
    mov     [rax + _KTHREAD.InitialStack], rcx
    mov     [rax + _KTHREAD.KernelStack], rcx
    ret

# As PsCreateThreadObject, with a stack, and ready to run.
export PsCreateSystemThread
frame_function PsCreateSystemThread, 0, rbx, rsi, rdi, r12
    mov     rsi, rdx
    mov     rdi, r8
    mov     r12d, r9d
    call    PsCreateThreadObject
    mov     rbx, rax
    call    MmCreateKernelStack
    mov     rcx, rax
    mov     rax, rbx
    call    PsSetKernelStack
    # What KiStartThread pops, below it the frame that SwapContext pops. Two unused slots keep the alignment.
    mov     rcx, [rbx + _KTHREAD.InitialStack]
    mov     [rcx - 0x20], rsi
    mov     [rcx - 0x18], rdi
    lea     rdx, [rip + KiStartThread]
    mov     [rcx - 0x20 - _KSWITCH_FRAME.size + _KSWITCH_FRAME.Return], rdx
    lea     rdx, [rcx - 0x20 - _KSWITCH_FRAME.size]
    mov     [rbx + _KTHREAD.KernelStack], rdx
    lea     rax, [rip + KiProcessorBlock]
    mov     rdx, [rax + r12 * 8]
    mov     rcx, rbx
    call    KiReadyThread
    mov     rax, rbx
    leave_frame
    ret
end_frame_function

    .section .rdata,"dr"
    .balign 8
KiDescriptors:
    .quad   0, 0
    .quad   0x00209b0000000000                  # 10: kernel code, 64 bit
    .quad   0x00cf93000000ffff                  # 18: kernel data
    .quad   0x00cffb000000ffff                  # 20: user code, 32 bit
    .quad   0x00cff3000000ffff                  # 28: user data
    .quad   0x0020fb0000000000                  # 30: user code, 64 bit
    .quad   0
    .quad   0, 0                                # 40: TSS, filled in
    .quad   0x0040f3000000ffff                  # 50: user thread block
    .quad   0
# The interrupt stack of each exception: NMI, double fault and machine check must not trust RSP.
KiInterruptStacks:
    .byte   0, 0, 3, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0
    .byte   0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
IdleProcessName:
    .ascii  "Idle\0\0\0\0\0\0\0\0\0\0\0"
SystemProcessName:
    .ascii  "System\0\0\0\0\0\0\0\0\0"
UserProcessName:
    .ascii  "smss.exe\0\0\0\0\0\0\0"
BootMessage:
    .asciz  "NT-like guest: kernel up\n"

export_data PsInitialSystemProcess
PsInitialSystemProcess:
    .quad   0
export_data KeNumberProcessors
KeNumberProcessors:
    .long   0
export_data NtBuildNumber
NtBuildNumber:
    .long   0xf0004a61                          # free build 19041
    .globl PsActiveProcessHead, PsIdleProcess, KiProcessorBlock, KiBootBlock, WlUserProcess, WlLowAlias
    .balign 8
PsActiveProcessHead:
    .quad   PsActiveProcessHead, PsActiveProcessHead
PsIdleProcess:
    .quad   0
WlUserProcess:
    .quad   0
PsNextThreadId:
    .quad   8
KiProcessorBlock:
    .fill   MAX_PROCESSORS, 8, 0
KiInterruptTable:
    .quad   0
KiBootBlock:
    .quad   0
MmPoolNext:
    .quad   0
MmStackNext:
    .quad   0
WlLowAlias:
    .long   0
KiKernelReady:
    .long   0

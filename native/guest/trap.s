# Interrupts, system calls, and the stop on anything unexpected.
.include "guest.inc"

.set TF, _KTRAP_FRAME.P1Home                    # RSP is the trap frame while one is being built

code_section .text$kernel

# From the machine frame (RSP at the error code) to a trap frame at RSP, with the volatile registers.
.macro build_trap_frame
    push    rbp
    .seh_pushreg rbp
    sub     rsp, _KTRAP_FRAME.Rbp
    .seh_stackalloc _KTRAP_FRAME.Rbp
    .seh_endprologue
    lea     rbp, [rsp + 0x80]                   # NT's own frame pointer
    mov     [rsp + _KTRAP_FRAME.Rax], rax
    mov     [rsp + _KTRAP_FRAME.Rcx], rcx
    mov     [rsp + _KTRAP_FRAME.Rdx], rdx
    mov     [rsp + _KTRAP_FRAME.R8], r8
    mov     [rsp + _KTRAP_FRAME.R9], r9
    mov     [rsp + _KTRAP_FRAME.R10], r10
    mov     [rsp + _KTRAP_FRAME.R11], r11
.endm

# The clock interrupt of every processor.
function KiClockInterrupt
    .seh_proc KiClockInterrupt
    .seh_pushframe
    push    rax                                 # in place of an error code
    .seh_stackalloc 8
    build_trap_frame
    test    byte ptr [rsp + _KTRAP_FRAME.SegCs], RPL_USER
    jz      .Lclock_from_kernel
    swapgs
    mov     rcx, gs:[PRCB + _KPRCB.CurrentThread]
    mov     [rcx + _KTHREAD.TrapFrame], rsp
.Lclock_from_kernel:
    cld
    stmxcsr [rsp + _KTRAP_FRAME.MxCsr]
    movaps  [rsp + _KTRAP_FRAME.Xmm0], xmm0
    movaps  [rsp + _KTRAP_FRAME.Xmm1], xmm1
    movaps  [rsp + _KTRAP_FRAME.Xmm2], xmm2
    movaps  [rsp + _KTRAP_FRAME.Xmm3], xmm3
    movaps  [rsp + _KTRAP_FRAME.Xmm4], xmm4
    movaps  [rsp + _KTRAP_FRAME.Xmm5], xmm5
    mov     al, gs:[_KPCR.Irql]
    mov     [rsp + _KTRAP_FRAME.PreviousIrql], al
    mov     byte ptr gs:[_KPCR.Irql], CLOCK_LEVEL
    mov     al, [rsp + _KTRAP_FRAME.SegCs]
    and     al, 1
    mov     [rsp + _KTRAP_FRAME.PreviousMode], al

    # The service routine has a stack of its own; the clock cannot interrupt it.
    mov     rax, rsp
    mov     rsp, gs:[PRCB + _KPRCB.IsrStack]
    sub     rsp, 8
    push    rax
    sub     rsp, 0x20
    inc     byte ptr gs:[PRCB + _KPRCB.NestingLevel]
    call    KeUpdateRunTime
    dec     byte ptr gs:[PRCB + _KPRCB.NestingLevel]
    add     rsp, 0x20
    pop     rsp
    call    [rip + __imp_HalEndOfInterrupt]

    cmp     byte ptr [rsp + _KTRAP_FRAME.PreviousIrql], DISPATCH_LEVEL
    jae     .Lclock_return
    mov     byte ptr gs:[_KPCR.Irql], DISPATCH_LEVEL
    call    KiDispatchInterrupt
.Lclock_return:
    mov     al, [rsp + _KTRAP_FRAME.PreviousIrql]
    mov     gs:[_KPCR.Irql], al
    ldmxcsr [rsp + _KTRAP_FRAME.MxCsr]
    movaps  xmm0, [rsp + _KTRAP_FRAME.Xmm0]
    movaps  xmm1, [rsp + _KTRAP_FRAME.Xmm1]
    movaps  xmm2, [rsp + _KTRAP_FRAME.Xmm2]
    movaps  xmm3, [rsp + _KTRAP_FRAME.Xmm3]
    movaps  xmm4, [rsp + _KTRAP_FRAME.Xmm4]
    movaps  xmm5, [rsp + _KTRAP_FRAME.Xmm5]
    mov     r11, [rsp + _KTRAP_FRAME.R11]
    mov     r10, [rsp + _KTRAP_FRAME.R10]
    mov     r9, [rsp + _KTRAP_FRAME.R9]
    mov     r8, [rsp + _KTRAP_FRAME.R8]
    mov     rdx, [rsp + _KTRAP_FRAME.Rdx]
    mov     rcx, [rsp + _KTRAP_FRAME.Rcx]
    mov     rax, [rsp + _KTRAP_FRAME.Rax]
    mov     rbp, [rsp + _KTRAP_FRAME.Rbp]
    test    byte ptr [rsp + _KTRAP_FRAME.SegCs], RPL_USER
    jz      .Lclock_return_to_kernel
    swapgs
.Lclock_return_to_kernel:
    add     rsp, _KTRAP_FRAME.Rip
    iretq
    .seh_endproc

# SYSCALL: RAX = service, R10 = first argument, RCX = return address, R11 = flags.
function KiSystemCall64
    .seh_proc KiSystemCall64
    swapgs
    mov     gs:[_KPCR.UserRsp], rsp
    mov     rsp, gs:[PRCB + _KPRCB.RspBase]
    push    KGDT64_R3_DATA | RPL_USER
    push    qword ptr gs:[_KPCR.UserRsp]
    push    r11
    push    KGDT64_R3_CODE | RPL_USER
    push    rcx
    .seh_pushframe
    push    rax                                 # in place of an error code
    .seh_stackalloc 8
    build_trap_frame
    mov     rcx, r10
    mov     byte ptr [rsp + _KTRAP_FRAME.PreviousMode], 1
    mov     byte ptr [rsp + _KTRAP_FRAME.PreviousIrql], PASSIVE_LEVEL
    mov     [rsp + _KTRAP_FRAME.Rbx], rbx
    mov     [rsp + _KTRAP_FRAME.Rdi], rdi
    mov     [rsp + _KTRAP_FRAME.Rsi], rsi
    mov     rbx, gs:[PRCB + _KPRCB.CurrentThread]
    mov     [rbx + _KTHREAD.TrapFrame], rsp
    inc     dword ptr gs:[PRCB + _KPRCB.KeSystemCalls]
    sti
    mov     edi, eax
    and     edi, 0xfff
    lea     r10, [rip + KeServiceDescriptorTable]
    mov     eax, 0xc000001c                     # STATUS_INVALID_SYSTEM_SERVICE
    cmp     edi, [r10 + _KSERVICE_TABLE_DESCRIPTOR.Limit]
    jae     .Lservice_done
    mov     r10, [r10 + _KSERVICE_TABLE_DESCRIPTOR.Base]
    movsxd  r11, dword ptr [r10 + rdi * 4]
    sar     r11, 4
    add     r10, r11
    call    r10                                 # the frame's P1Home.. are its home space
.Lservice_done:
    cli
    mov     rcx, [rsp + _KTRAP_FRAME.Rip]
    mov     r11d, [rsp + _KTRAP_FRAME.EFlags]
    mov     rbx, [rsp + _KTRAP_FRAME.Rbx]
    mov     rdi, [rsp + _KTRAP_FRAME.Rdi]
    mov     rsi, [rsp + _KTRAP_FRAME.Rsi]
    mov     rbp, [rsp + _KTRAP_FRAME.Rbp]
    mov     r9, [rsp + _KTRAP_FRAME.R9]
    mov     r8, [rsp + _KTRAP_FRAME.R8]
    mov     rdx, [rsp + _KTRAP_FRAME.Rdx]
    mov     rsp, [rsp + _KTRAP_FRAME.Rsp]
    swapgs
    .byte   0x48, 0x0f, 0x07                    # sysretq
    .seh_endproc

# --- anything else stops the guest ------------------------------------------------------------------------------

    .balign 16
KiTrapStubs:
    .globl  KiTrapStubs
    .set    vector, 0
    .rept   256
    .balign 16, 0xcc
    .if (vector == 8) | (vector == 17) | ((vector >= 10) & (vector <= 14)) | (vector == 21)
    nop
    nop
    .else
    push    -1                                  # in place of an error code
    .endif
    push    vector
    jmp     KiUnexpectedInterrupt
    .set    vector, vector + 1
    .endr

# Stack: vector, error code, machine frame. Writes down what happened, if it is the first, and stops this processor
# for good.
frame_function KiUnexpectedInterrupt, 0
    cli
    mov     eax, 1
    xchg    [rip + KiStopClaimed], eax
    test    eax, eax
    jnz     .Lstopped
    lea     rdi, [rip + WlReport]
    mov     rax, [rsp]
    mov     [rdi + REPORT_STOP_VECTOR], rax
    mov     rax, [rsp + 8]
    mov     [rdi + REPORT_STOP_ERROR], rax
    mov     rax, [rsp + 0x10]
    mov     [rdi + REPORT_STOP_RIP], rax
    mov     rax, cr2
    mov     [rdi + REPORT_STOP_CR2], rax
    mov     qword ptr [rdi + REPORT_STOPPED], 1
    lea     rsi, [rip + StopMessage]
    call    [rip + __imp_HalDisplayString]
    mov     rdx, [rdi + REPORT_STOP_VECTOR]
    call    WlPrintHex
    mov     rdx, [rdi + REPORT_STOP_RIP]
    call    WlPrintHex
    mov     rdx, [rdi + REPORT_STOP_ERROR]
    call    WlPrintHex
    mov     rdx, [rdi + REPORT_STOP_CR2]
    call    WlPrintHex
.Lstopped:
    cli
    hlt
    jmp     .Lstopped
end_frame_function

# RDX = number, printed as 16 hexadecimal digits and a line end.
frame_function WlPrintHex, 0
    mov     ecx, 16
.Lnext_digit:
    rol     rdx, 4
    mov     eax, edx
    and     eax, 15
    cmp     al, 10
    jb      .Lbelow_ten
    add     al, 'a' - '0' - 10
.Lbelow_ten:
    add     al, '0'
    call    [rip + __imp_HalPutCharacter]
    dec     ecx
    jnz     .Lnext_digit
    mov     al, '\n'
    jmp     [rip + __imp_HalPutCharacter]
end_frame_function

# --- system services --------------------------------------------------------------------------------------------

# Entries as NT packs them: (address - table) << 4, the low bits the number of stack arguments.
.macro service function
    .long   (\function - KiServiceTable) << 4
.endm

    .balign 16
    .globl  KiServiceTable, KiServiceLimit, KeServiceDescriptorTable
KiServiceTable:
    service WlServiceReport
    service WlServiceTransform
    service WlServiceNothing
    service WlServiceNothing
    service WlServiceTransform
    service WlServiceNothing
    service WlServiceTransform
    service WlServiceNothing
    .if (. - KiServiceTable) / 4 - KI_SERVICE_LIMIT
    .error  "the service table does not have KI_SERVICE_LIMIT entries"
    .endif
KiServiceLimit:
    .long   KI_SERVICE_LIMIT

# RCX = loops the user thread has done, RDX = errors it has seen.
function WlServiceReport
    lea     rax, [rip + WlReport]
    mov     [rax + REPORT_USER_LOOPS], rcx
    mov     [rax + REPORT_USER_ERRORS], rdx
    inc     qword ptr [rax + REPORT_SYSTEM_CALLS]
    xor     eax, eax
    ret

# What the user thread checks: RCX * 3 + 1.
function WlServiceTransform
    lea     rax, [rcx + rcx * 2 + 1]
    lea     rcx, [rip + WlReport]
    inc     qword ptr [rcx + REPORT_SYSTEM_CALLS]
    ret

function WlServiceNothing
    xor     eax, eax
    ret

    .section .rdata,"dr"
StopMessage:
    .asciz  "*** STOP: vector, RIP, error code, CR2\n"

    .data
    .balign 16
KiStopClaimed:
    .long   0
    .balign 16
KeServiceDescriptorTable:
    .quad   KiServiceTable
    .quad   0
    .quad   KI_SERVICE_LIMIT
    .quad   0

# Who runs on this kernel: the switch workers, the thread of the look-alikes, the integrity checker, a user thread; and
# where there is a module, its lexer (lexer.s).
.include "guest.inc"

# Switches between two publications of a stream's checksum.
.set PUBLISH_INTERVAL, 64
# Few: where each is a trap, a DPC is longer than a tick, and nothing else would run.
.set SWITCHES_PER_DPC, 4
.set TICKS_BETWEEN_LOOK_ALIKES, 8
.set INTEGRITY_QUANTUM, 5
.set CALL_BYTES, 16
.set CALL_RANGE, 8
.set SEED_STEP, 0x9e3779b1

code_section INIT

# ECX = form, EDX = processor; RAX = the new stream.
function WlCreateStream
    lea     r8, [rip + WlReport]
    mov     eax, [r8 + REPORT_STREAMS_USED]
    inc     dword ptr [r8 + REPORT_STREAMS_USED]
    lea     r9d, [rax + 1]
    imul    r9d, r9d, SEED_STEP
    imul    eax, eax, STREAM_BYTES
    lea     rax, [r8 + rax + REPORT_STREAMS]
    mov     [rax + STREAM_FORM], ecx
    mov     [rax + STREAM_PROCESSOR], edx
    mov     r8, [rip + KiBootBlock]
    xor     r9d, [r8 + BOOT_SEED]
    mov     r8d, 1
    cmovz   r9d, r8d                            # zero is the one state a xorshift never leaves
    mov     [rax + STREAM_SEED], r9d
    mov     [rax + STREAM_SLOTS + SLOT_GENERATOR], r9d
    ret

# Creates every thread; they run when the processors start.
frame_function WlCreateWorkload, 0x20, rbx, rsi, rdi
    xor     esi, esi
.Lnext_processor:
    mov     ecx, FORM_ONE_LEVEL
    mov     edx, esi
    call    WlCreateStream
    lea     rdx, [rip + WlWorkerThread]
    call    .Lcreate_system_thread
    mov     ecx, FORM_TWO_LEVEL
    mov     edx, esi
    call    WlCreateStream
    lea     rdx, [rip + WlWorkerThread]
    call    .Lcreate_system_thread
    mov     ecx, FORM_ONE_LEVEL
    mov     edx, esi
    call    WlCreateStream
    lea     rcx, [rip + WlDpcStreams]
    mov     [rcx + rsi * 8], rax
    inc     esi
    cmp     esi, [rip + KeNumberProcessors]
    jb      .Lnext_processor

    # The single threads: the checker first, the others on the last processor.
    xor     esi, esi
    xor     eax, eax
    lea     rdx, [rip + WlIntegrityThread]
    call    .Lcreate_system_thread
    # Every read of a trapped page costs it much: a longer quantum keeps its sweeps short.
    mov     byte ptr [rax + _KTHREAD.QuantumReset], INTEGRITY_QUANTUM
    mov     esi, [rip + KeNumberProcessors]
    dec     esi
    mov     ecx, FORM_LOOK_ALIKE
    mov     edx, esi
    call    WlCreateStream
    lea     rdx, [rip + WlLookAlikeThread]
    call    .Lcreate_system_thread

    mov     rbx, [rip + KiBootBlock]
    cmp     qword ptr [rbx + BOOT_MODULE], 0
    je      .Lno_module
    mov     rax, rbx
    lea     rdx, [rip + WlLexerThread]
    call    .Lcreate_system_thread
.Lno_module:
    mov     rdi, [rbx + BOOT_USER_CODE_ALIAS]
    lea     rsi, [rip + WlUserCode]
    mov     ecx, OFFSET WlUserCodeEnd - WlUserCode
    rep movsb
    mov     rcx, [rip + WlUserProcess]
    lea     rdx, [rip + WlUserThreadStart]
    mov     r8, rbx
    mov     r9d, [rip + KeNumberProcessors]
    dec     r9d
    call    PsCreateSystemThread
    leave_frame
    ret
.Lcreate_system_thread:
    mov     r8, rax
    mov     rcx, [rip + PsInitialSystemProcess]
    mov     r9d, esi
    jmp     PsCreateSystemThread
end_frame_function

code_section .text$kernel

# RCX = stream: a thread that switches for ever, from the first tick on: until then the processor is idle.
frame_function WlWorkerThread, 0x28
    mov     rbx, rcx
    mov     ecx, 1
    call    KeDelayExecutionThread
.Lwork:
    mov     rcx, rbx
    mov     edx, PUBLISH_INTERVAL
    call    WlRunStream
    jmp     .Lwork
end_frame_function

# RCX = stream: one round of all look-alikes and a few other readers, then a rest.
frame_function WlLookAlikeThread, 0x28
    mov     rbx, rcx
.Llook_alike_round:
    mov     rcx, rbx
    lea     rdx, [rip + WlLookAlikeCallsEnd]
    lea     rax, [rip + WlLookAlikeCalls]
    sub     rdx, rax
    shr     edx, 4                              # CALL_BYTES
    call    WlRunStream
    call    WlReadLikeAnUnwinder
    mov     ecx, TICKS_BETWEEN_LOOK_ALIKES
    call    KeDelayExecutionThread
    jmp     .Llook_alike_round
end_frame_function

# Runs from the clock, on the DPC stack: switches there too.
function WlDpcRoutine
    mov     eax, gs:[PRCB + _KPRCB.Number]
    lea     rcx, [rip + WlDpcStreams]
    mov     rcx, [rcx + rax * 8]
    mov     edx, SWITCHES_PER_DPC
    jmp     WlRunStream

# RCX = stream, EDX = switches: calls that many functions of the stream's form, chosen and fed by its generator
# (xorshift32), and publishes the checksum. workload-model.ts does the same arithmetic.
frame_function WlRunStream, 0x28, rbx, rbp, rsi, rdi, r12, r13, r14, r15
    mov     rbx, rcx
    mov     r15d, edx
    lea     rsi, [rip + WlOneLevelCalls]
    lea     rdi, [rip + WlOneLevelCallsEnd]
    cmp     dword ptr [rbx + STREAM_FORM], FORM_ONE_LEVEL
    je      .Lcalls_known
    lea     rsi, [rip + WlTwoLevelCalls]
    lea     rdi, [rip + WlTwoLevelCallsEnd]
    cmp     dword ptr [rbx + STREAM_FORM], FORM_TWO_LEVEL
    je      .Lcalls_known
    lea     rsi, [rip + WlLookAlikeCalls]
    lea     rdi, [rip + WlLookAlikeCallsEnd]
.Lcalls_known:
    sub     rdi, rsi
    shr     edi, 4                              # CALL_BYTES
    mov     eax, [rbx + STREAM_SEQUENCE]
    and     eax, 1
    shl     eax, 4                              # SLOT_BYTES
    lea     rax, [rbx + rax + STREAM_SLOTS]
    mov     r12d, [rax + SLOT_GENERATOR]
    mov     r13d, [rax + SLOT_CHECKSUM]
    xor     r14d, r14d
.Lnext_switch:
    mov     eax, r12d
    shl     eax, 13
    xor     r12d, eax
    mov     eax, r12d
    shr     eax, 17
    xor     r12d, eax
    mov     eax, r12d
    shl     eax, 5
    xor     r12d, eax
    # Which function: by the low half of the number, or, for the look-alikes, each in turn.
    mov     edx, r14d
    cmp     dword ptr [rbx + STREAM_FORM], FORM_LOOK_ALIKE
    je      .Lfunction_known
    movzx   edx, r12w
    imul    edx, edi
    shr     edx, 16
.Lfunction_known:
    shl     edx, 4                              # CALL_BYTES
    add     rdx, rsi
    # Its argument: the high half, scaled to the range.
    mov     ecx, r12d
    shr     ecx, 16
    imul    ecx, [rdx + CALL_RANGE]
    shr     ecx, 16
    mov     rax, [rdx]
    mov     edx, r13d
    call    rax
    mov     r13d, eax
    inc     qword ptr [rbx + STREAM_RUNNING]
    inc     r14d
    cmp     r14d, r15d
    jb      .Lnext_switch

    mov     eax, [rbx + STREAM_SEQUENCE]
    mov     ecx, eax
    and     ecx, 1
    shl     ecx, 4                              # SLOT_BYTES
    lea     rcx, [rbx + rcx + STREAM_SLOTS]
    mov     r8, [rcx + SLOT_COUNT]
    add     r8, r15
    inc     eax
    mov     edx, eax
    and     edx, 1
    shl     edx, 4
    lea     rdx, [rbx + rdx + STREAM_SLOTS]
    mov     [rdx + SLOT_COUNT], r8
    mov     [rdx + SLOT_CHECKSUM], r13d
    mov     [rdx + SLOT_GENERATOR], r12d
    mov     [rbx + STREAM_SEQUENCE], eax
    leave_frame
    ret
end_frame_function

# --- user mode --------------------------------------------------------------------------------------------------

# RCX = boot block: leaves for user mode, for good.
frame_function WlUserThreadStart, 0
    cli
    push    KGDT64_R3_DATA | RPL_USER
    push    qword ptr [rcx + BOOT_USER_STACK]
    push    0x202                               # IF
    push    KGDT64_R3_CODE | RPL_USER
    push    qword ptr [rcx + BOOT_USER_CODE]
    mov     rax, gs:[PRCB + _KPRCB.CurrentThread]
    mov     byte ptr [rax + _KTHREAD.PreviousMode], 1
    xor     eax, eax
    xor     ecx, ecx
    xor     edx, edx
    xor     r8d, r8d
    xor     r9d, r9d
    xor     r10d, r10d
    xor     r11d, r11d
    swapgs
    iretq
end_frame_function

    .section .rdata,"dr"
# Position independent, copied to user memory: checks that no interrupt and no system call changes a register.
.set USER_SERVICE_REPORT, 0
.set USER_SERVICE_TRANSFORM, 1
.set USER_PATTERN, 0x5a5a1234
.set USER_LOOPS_PER_CALL, 1000
WlUserCode:
    xor     r12d, r12d                          # loops
    xor     r13d, r13d                          # errors
    mov     ebx, USER_PATTERN
    push    rbx
.Luser_round:
    .set    number, 0
    .irp    register, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r14, r15
    .set    number, number + 1
    lea     \register, [rbx + number]
    .endr
    .irp    number, 0, 1, 2, 3, 4, 5
    lea     eax, [rbx + 16 + \number]
    movd    xmm\number, eax
    .endr
    mov     ecx, USER_LOOPS_PER_CALL
    xor     eax, eax
.Luser_loop:
    add     rax, rcx
    inc     r12
    dec     ecx
    jnz     .Luser_loop
    cmp     rax, USER_LOOPS_PER_CALL * (USER_LOOPS_PER_CALL + 1) / 2
    jne     .Luser_error
    lea     rax, [rbx + 7]
    cmp     r10, rax
    jne     .Luser_error
    inc     rax
    cmp     r11, rax
    jne     .Luser_error
    mov     r10, r12
    mov     eax, USER_SERVICE_TRANSFORM
    syscall                                     # leaves RCX, R10 and R11 undefined
    lea     rcx, [r12 + r12 * 2 + 1]
    cmp     rax, rcx
    jne     .Luser_error
    mov     eax, USER_PATTERN
    cmp     rbx, rax
    jne     .Luser_error
    cmp     [rsp], rbx
    jne     .Luser_error
    .set    number, 0
    .irp    register, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r14, r15
    .set    number, number + 1
    .ifnc   \register,r10
    .ifnc   \register,r11
    lea     rax, [rbx + number]
    cmp     \register, rax
    jne     .Luser_error
    .endif
    .endif
    .endr
    .irp    number, 0, 1, 2, 3, 4, 5
    movd    ecx, xmm\number
    lea     eax, [rbx + 16 + \number]
    cmp     ecx, eax
    jne     .Luser_error
    .endr
    jmp     .Luser_report
.Luser_error:
    inc     r13
    mov     ebx, USER_PATTERN
.Luser_report:
    mov     r10, r12
    mov     rdx, r13
    mov     eax, USER_SERVICE_REPORT
    syscall
    jmp     .Luser_round
WlUserCodeEnd:

    .data
    .balign 64
    .globl  WlReport
WlReport:
    .fill   REPORT_BYTES, 1, 0
WlDpcStreams:
    .fill   MAX_PROCESSORS, 8, 0

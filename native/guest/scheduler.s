# Round robin per processor: the clock ends a quantum, threads wait for ticks, the idle loop halts.
.include "guest.inc"

# Every so many ticks a processor runs its DPC, on the DPC stack.
.set TICKS_PER_DPC, 8

code_section .text$kernel

# RCX = entry, RDX = list head.
function KiInsertTailList
    mov     rax, [rdx + _LIST_ENTRY.Blink]
    mov     [rcx + _LIST_ENTRY.Flink], rdx
    mov     [rcx + _LIST_ENTRY.Blink], rax
    mov     [rax + _LIST_ENTRY.Flink], rcx
    mov     [rdx + _LIST_ENTRY.Blink], rcx
    ret

# RCX = entry.
function KiRemoveEntryList
    mov     rax, [rcx + _LIST_ENTRY.Flink]
    mov     rdx, [rcx + _LIST_ENTRY.Blink]
    mov     [rax + _LIST_ENTRY.Blink], rdx
    mov     [rdx + _LIST_ENTRY.Flink], rax
    ret

# RCX = thread, RDX = KPRCB: to the end of the ready list.
function KiReadyThread
    mov     byte ptr [rcx + _KTHREAD.State], STATE_READY
    add     rcx, _KTHREAD.WaitListEntry
    add     rdx, _KPRCB.DispatcherReadyListHead
    jmp     KiInsertTailList

# RCX = KPRCB; RAX = the first ready thread, taken from the list, or 0.
frame_function KiSelectReadyThread, 0
    lea     r8, [rcx + _KPRCB.DispatcherReadyListHead]
    mov     rcx, [r8]
    cmp     rcx, r8
    je      .Lnone_ready
    call    KiRemoveEntryList
    lea     rax, [rcx - _KTHREAD.WaitListEntry]
    ret
.Lnone_ready:
    xor     eax, eax
    ret
end_frame_function

# RCX = old thread, RDX = new thread; interrupts are off. Returns when the old thread runs again.
frame_function KiSwapContext, _KEXCEPTION_FRAME.Return
    mov     [rsp + _KEXCEPTION_FRAME.Rbp], rbp
    mov     [rsp + _KEXCEPTION_FRAME.Rbx], rbx
    mov     [rsp + _KEXCEPTION_FRAME.Rdi], rdi
    mov     [rsp + _KEXCEPTION_FRAME.Rsi], rsi
    mov     [rsp + _KEXCEPTION_FRAME.R12], r12
    mov     [rsp + _KEXCEPTION_FRAME.R13], r13
    mov     [rsp + _KEXCEPTION_FRAME.R14], r14
    mov     [rsp + _KEXCEPTION_FRAME.R15], r15
    mov     rbx, gs:[_KPCR.Self]
    mov     rdi, rcx
    mov     rsi, rdx
    call    SwapContext
    mov     rbp, [rsp + _KEXCEPTION_FRAME.Rbp]
    mov     rbx, [rsp + _KEXCEPTION_FRAME.Rbx]
    mov     rdi, [rsp + _KEXCEPTION_FRAME.Rdi]
    mov     rsi, [rsp + _KEXCEPTION_FRAME.Rsi]
    mov     r12, [rsp + _KEXCEPTION_FRAME.R12]
    mov     r13, [rsp + _KEXCEPTION_FRAME.R13]
    mov     r14, [rsp + _KEXCEPTION_FRAME.R14]
    mov     r15, [rsp + _KEXCEPTION_FRAME.R15]
    leave_frame
    ret
end_frame_function

# RBX = KPCR, RDI = old thread, RSI = new thread.
frame_function SwapContext, _KSWITCH_FRAME.Rbp, rbp
    mov     byte ptr [rsi + _KTHREAD.Running], 1
    mov     byte ptr [rsi + _KTHREAD.State], STATE_RUNNING
    mov     [rdi + _KTHREAD.KernelStack], rsp
    mov     [rbx + PRCB + _KPRCB.CurrentThread], rsi
    mov     rsp, [rsi + _KTHREAD.KernelStack]
    mov     byte ptr [rdi + _KTHREAD.Running], 0
    mov     rax, [rsi + _KTHREAD.InitialStack]
    mov     [rbx + PRCB + _KPRCB.RspBase], rax
    mov     rcx, [rbx + _KPCR.TssBase]
    mov     [rcx + _KTSS64.Rsp0], rax
    mov     rax, [rsi + _KTHREAD.Process]
    cmp     rax, [rdi + _KTHREAD.Process]
    je      .Lsame_process
    mov     rax, [rax + _KPROCESS.DirectoryTableBase]
    mov     cr3, rax
.Lsame_process:
    movzx   eax, byte ptr [rsi + _KTHREAD.QuantumReset]
    add     eax, [rbx + PRCB + _KPRCB.ClockInterrupts]
    mov     [rsi + _KTHREAD.QuantumTarget], rax
    inc     dword ptr [rsi + _KTHREAD.ContextSwitches]
    inc     dword ptr [rbx + PRCB + _KPRCB.KeContextSwitches]
    leave_frame
    ret
end_frame_function

# Where a thread that has never run begins: start routine and argument lie on its stack.
frame_function KiStartThread, 0
    mov     byte ptr gs:[_KPCR.Irql], PASSIVE_LEVEL
    pop     rax
    pop     rcx
    sti
    call    rax
    ud2
end_frame_function

# RCX = KPRCB, RDX = the current thread, which has been put wherever it belongs: runs another one.
frame_function KiSwapThread, 0x20, rbx
    mov     rbx, rdx
    mov     [rsp], rcx
    call    KiSelectReadyThread
    mov     rcx, [rsp]
    test    rax, rax
    jnz     .Lnext_thread_known
    mov     rax, [rcx + _KPRCB.IdleThread]
.Lnext_thread_known:
    mov     rcx, rbx
    mov     rdx, rax
    call    KiSwapContext
    leave_frame
    ret
end_frame_function

# ECX = ticks: the calling thread waits that long.
export KeDelayExecutionThread
frame_function KeDelayExecutionThread, 0x20, rbx
    cli
    mov     byte ptr gs:[_KPCR.Irql], DISPATCH_LEVEL
    mov     rdx, gs:[_KPCR.CurrentPrcb]
    mov     rbx, [rdx + _KPRCB.CurrentThread]
    mov     eax, [rdx + _KPRCB.ClockInterrupts]
    add     eax, ecx
    mov     [rbx + _KTHREAD.Timer + _KTIMER.DueTime], rax
    mov     byte ptr [rbx + _KTHREAD.WaitReason], DELAY_EXECUTION
    mov     byte ptr [rbx + _KTHREAD.State], STATE_WAITING
    lea     rcx, [rbx + _KTHREAD.WaitListEntry]
    add     rdx, _KPRCB.WaitListHead
    call    KiInsertTailList
    mov     rcx, gs:[_KPCR.CurrentPrcb]
    mov     rdx, rbx
    call    KiSwapThread
    mov     byte ptr gs:[_KPCR.Irql], PASSIVE_LEVEL
    sti
    leave_frame
    ret
end_frame_function

# The idle thread of each processor, at DISPATCH_LEVEL: the clock never takes the processor from it.
frame_function KiIdleLoop, 0
    cli
    mov     rcx, gs:[_KPCR.CurrentPrcb]
    call    KiSelectReadyThread
    test    rax, rax
    jz      .Lhalt
    mov     qword ptr gs:[PRCB + _KPRCB.NextThread], 0
    mov     rdx, rax
    mov     rcx, gs:[PRCB + _KPRCB.IdleThread]
    call    KiSwapContext
    mov     byte ptr gs:[_KPCR.Irql], DISPATCH_LEVEL
    jmp     KiIdleLoop
.Lhalt:
    call    WlProcessorReport
    inc     qword ptr [rax + PROCESSOR_HALTS]
    sti
    hlt
    jmp     KiIdleLoop
end_frame_function

# RAX = the part of the report about this processor; keeps the other registers.
function WlProcessorReport
    mov     eax, gs:[PRCB + _KPRCB.Number]
    imul    eax, eax, PROCESSOR_BYTES
    add     rax, [rip + WlProcessorReports]
    ret

# The clock's service routine, on the ISR stack: time passes, waits end.
frame_function KeUpdateRunTime, 0x20, rbx, rsi, rdi
    mov     rbx, gs:[_KPCR.CurrentPrcb]
    inc     dword ptr [rbx + _KPRCB.ClockInterrupts]
    call    WlProcessorReport
    inc     qword ptr [rax + PROCESSOR_TICKS]
    mov     rcx, [rbx + _KPRCB.CurrentThread]
    mov     eax, [rbx + _KPRCB.ClockInterrupts]
    cmp     eax, [rcx + _KTHREAD.QuantumTarget]
    js      .Lquantum_goes_on
    mov     byte ptr [rbx + _KPRCB.QuantumEnd], 1
.Lquantum_goes_on:
    lea     rdi, [rbx + _KPRCB.WaitListHead]
    mov     rsi, [rdi]
.Lnext_waiter:
    cmp     rsi, rdi
    je      .Lno_more_waiters
    mov     rcx, rsi
    mov     rsi, [rsi]
    mov     eax, [rbx + _KPRCB.ClockInterrupts]
    cmp     eax, [rcx - _KTHREAD.WaitListEntry + _KTHREAD.Timer + _KTIMER.DueTime]
    js      .Lnext_waiter
    call    KiRemoveEntryList
    # To the front of the ready list: it takes the processor from the running thread.
    lea     rdx, [rbx + _KPRCB.DispatcherReadyListHead]
    mov     byte ptr [rcx - _KTHREAD.WaitListEntry + _KTHREAD.State], STATE_READY
    mov     rdx, [rdx]
    call    KiInsertTailList
    lea     rax, [rcx - _KTHREAD.WaitListEntry]
    mov     [rbx + _KPRCB.NextThread], rax
    jmp     .Lnext_waiter
.Lno_more_waiters:
    leave_frame
    ret
end_frame_function

# At DISPATCH_LEVEL with interrupts off, on the stack of the interrupted thread: DPCs, then another thread.
frame_function KiDispatchInterrupt, 0x20, rbx
    mov     rbx, gs:[_KPCR.CurrentPrcb]
    test    dword ptr [rbx + _KPRCB.ClockInterrupts], TICKS_PER_DPC - 1
    jnz     .Lno_dpc
    mov     rax, rsp
    mov     rsp, [rbx + _KPRCB.DpcStack]
    sub     rsp, 8
    push    rax
    sub     rsp, 0x20
    mov     byte ptr [rbx + _KPRCB.DpcRoutineActive], 1
    sti
    call    KiRetireDpcList
    cli
    mov     byte ptr [rbx + _KPRCB.DpcRoutineActive], 0
    add     rsp, 0x20
    pop     rsp
.Lno_dpc:
    mov     rax, [rbx + _KPRCB.CurrentThread]
    cmp     rax, [rbx + _KPRCB.IdleThread]
    je      .Lkeep_running                      # the idle loop looks by itself
    mov     ecx, WR_DISPATCH_INT
    cmp     qword ptr [rbx + _KPRCB.NextThread], 0
    jne     .Lpreempt                           # a thread whose wait has ended stands first in the list
    mov     ecx, WR_QUANTUM_END
    cmp     byte ptr [rbx + _KPRCB.QuantumEnd], 0
    je      .Lkeep_running
    lea     rdx, [rbx + _KPRCB.DispatcherReadyListHead]
    cmp     rdx, [rdx]
    je      .Lkeep_running
.Lpreempt:
    mov     byte ptr [rbx + _KPRCB.QuantumEnd], 0
    mov     qword ptr [rbx + _KPRCB.NextThread], 0
    mov     [rax + _KTHREAD.WaitReason], cl
    mov     rcx, rax
    mov     rdx, rbx
    mov     [rsp], rax
    call    KiReadyThread
    mov     rcx, rbx
    mov     rdx, [rsp]
    call    KiSwapThread
.Lkeep_running:
    leave_frame
    ret
end_frame_function

# On the DPC stack, interruptible.
frame_function KiRetireDpcList, 0x28
    call    WlProcessorReport
    inc     qword ptr [rax + PROCESSOR_DPCS]
    call    WlDpcRoutine
    leave_frame
    ret
end_frame_function

    .data
    .balign 8
WlProcessorReports:
    .quad   WlReport + REPORT_PROCESSORS

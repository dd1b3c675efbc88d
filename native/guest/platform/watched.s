# A guest that makes every kind of access over and over, each from a page of its own and by one instruction whose place
# src/xen-rig/watched-guest.ts knows: for the conformance checks on Xen. The start-up page enters it with RCX = its first
# page of data, EDX = number of the processor.
.intel_syntax noprefix
.include "platform/pvh.inc"

.set PAGE, 0x1000
.set READ_8, 0 * PAGE + 0x10
.set READ_4, 1 * PAGE + 0x10
.set READ_2, 2 * PAGE + 0x10
.set READ_1, 3 * PAGE + 0x10
.set STRING, 4 * PAGE + 0x10
.set CROSSING, 6 * PAGE - 3     # from page 5 to page 6
.set WRITTEN, 7 * PAGE
.set CALLED, 8 * PAGE
.set RESULTS, 9 * PAGE

# Of the results, 0x100 bytes for each processor.
.set PASSES, 0x00
.set SEEN_8, 0x08
.set SEEN_4, 0x10
.set SEEN_2, 0x18
.set SEEN_1, 0x20
.set SEEN_CROSSING, 0x28
.set SEEN_RCX, 0x30
.set SEEN_R15, 0x38
.set DETOURS, 0x40
.set SEEN_STRING, 0x60

.set X2APIC_COMMAND, 0x830
.set ALL_OTHERS_INIT, 0xc4500
.set ALL_OTHERS_START, 0xc4600
.set HYPERCALL_SCHEDULE, 29     # with RDI = 0: let others run

    .text
    mov     rbx, rcx
    mov     ebp, edx
    shl     ebp, 8
    lea     r14, [rbx + rbp + RESULTS]
    test    edx, edx
    jnz     Pass
    mov     ecx, X2APIC_COMMAND
    mov     eax, ALL_OTHERS_INIT
    wrmsr
    mov     eax, ALL_OTHERS_START | START_PAGE
    wrmsr

    .org    0x80, 0x90
Pass:
    mov     rax, [rbx + READ_8]
    mov     [r14 + SEEN_8], rax
    mov     [r14 + SEEN_RCX], rcx
    .org    0xa0, 0x90
    mov     eax, [rbx + READ_4]
    mov     [r14 + SEEN_4], rax
    .org    0xc0, 0x90
    mov     ax, [rbx + READ_2]
    mov     [r14 + SEEN_2], rax
    .org    0xe0, 0x90
    mov     al, [rbx + READ_1]
    mov     [r14 + SEEN_1], rax
    .org    0x100, 0x90
    mov     rax, [rbx + CROSSING]
    mov     [r14 + SEEN_CROSSING], rax
    lea     rsi, [rbx + STRING]
    lea     rdi, [r14 + SEEN_STRING]
    mov     ecx, 4
    .org    0x120, 0x90
    rep movsq
    mov     rax, [r14 + PASSES]
    .org    0x140, 0x90
    mov     [rbx + rbp + WRITTEN], rax
    lea     rax, [rbx + CALLED]
    call    rax
    mov     [r14 + SEEN_R15], r15
    inc     qword ptr [r14 + PASSES]
    mov     eax, HYPERCALL_SCHEDULE
    xor     edi, edi
    vmcall
    jmp     Pass

# Nobody comes here but who sets RIP.
    .org    0x180, 0x90
    inc     qword ptr [r14 + DETOURS]
    jmp     Pass

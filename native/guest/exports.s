# What a kernel image has besides: small exports, among them some on which no hook fits, something in each of the
# small sections, and the debug record.
.include "guest.inc"
.include "switch.inc"

code_section .text$kernel

# A call among the first bytes.
export KeQueryTickCount
frame_function KeQueryTickCount, 0
    call    WlProcessorReport
    mov     rax, [rax + PROCESSOR_TICKS]
    ret
end_frame_function
unhookable KeQueryTickCount, call

# The loop jumps back to the second instruction.
export RtlFillMemoryUlong
function RtlFillMemoryUlong
    nop
.Lfill:
    mov     [rcx], r8d
    add     rcx, 4
    sub     rdx, 4
    ja      .Lfill
    ret
unhookable RtlFillMemoryUlong, branch-target

# Three bytes, as its unwind data says.
export KeGetCurrentIrqlTest
frame_function KeGetCurrentIrqlTest, 0
    xor     eax, eax
    ret
end_frame_function
unhookable KeGetCurrentIrqlTest, too-short

# Three bytes, and nothing says so but the return.
export KeGetRecommendedSharedDataAlignment
function KeGetRecommendedSharedDataAlignment
    mov     al, 64
    ret
unhookable KeGetRecommendedSharedDataAlignment, too-short

# A RIP-relative operand in the first bytes: a hook has to relocate it.
export MmIsVerifierEnabled
function MmIsVerifierEnabled
    mov     eax, [rip + NtBuildNumber]
    mov     [rcx], eax
    ret

# The last page of .text holds only this: the rest is slack.
    code_section .text$tail
export RtlGetVersion
function RtlGetVersion
    mov     eax, [rip + NtBuildNumber]
    movzx   eax, ax
    ret

    code_section TRACESUP
function EtwpTraceStub
    xor     eax, eax
    ret

    code_section PAGE
function MmPagedStub
    xor     eax, eax
    ret

    code_section RETPOL
function KiRetpolineStub
    ret

    code_section MINIEX
function MiniExStub
    xor     eax, eax
    ret

debug_record "ntkrnlmp.pdb"

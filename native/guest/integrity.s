# The integrity checker, PatchGuard's part: it keeps comparing headers, all non-writable sections and the slack
# behind them, of NT, the HAL and the module, with a copy made at boot, and it reads them in every way a checker may. Most
# of a page is read widely; which 256 bytes are read narrowly changes with page and sweep. Where reads have to be
# simple, no instruction reads memory more than once, or an image on two pages.
.include "guest.inc"

.set PE_OFFSET, 0x3c
.set PE_SECTIONS, 0x06
.set PE_OPTIONAL_SIZE, 0x14
.set PE_OPTIONAL, 0x18
.set PE_SIZE_OF_IMAGE, 0x50
.set SECTION_VIRTUAL_SIZE, 0x08
.set SECTION_ADDRESS, 0x0c
.set SECTION_CHARACTERISTICS, 0x24
.set SECTION_BYTES, 40
.set SECTION_WRITABLE, 0x80000000

.set BLOCK_BYTES, 256
.set BLOCKS, PAGE_BYTES / BLOCK_BYTES
.set UNWINDER_READS, 4

# An image that is checked, and the copy it is compared with.
.set CHECKED_BASE, 0x00
.set CHECKED_REFERENCE, 0x08
.set CHECKED_BYTES, 0x10

code_section INIT

# RCX = boot block: copies the images as the loader left them.
frame_function WlKeepReferenceImages, 0, rbx, rsi, rdi
    lea     rbx, [rip + WlChecked]
    lea     rax, [rip + __ImageBase]
    mov     [rbx + CHECKED_BASE], rax
    mov     rax, [rcx + BOOT_HAL]
    mov     [rbx + CHECKED_BYTES + CHECKED_BASE], rax
    mov     rax, [rcx + BOOT_MODULE]
    mov     [rbx + 2 * CHECKED_BYTES + CHECKED_BASE], rax
.Lkeep_next:
    mov     rsi, [rbx + CHECKED_BASE]
    test    rsi, rsi
    jz      .Lall_kept
    call    .Lkeep_reference
    add     rbx, CHECKED_BYTES
    jmp     .Lkeep_next
.Lall_kept:
    leave_frame
    ret
.Lkeep_reference:
    mov     eax, [rsi + PE_OFFSET]
    mov     ecx, [rsi + rax + PE_SIZE_OF_IMAGE]
    mov     edx, ecx
    call    ExAllocatePool
    mov     [rbx + CHECKED_REFERENCE], rax
    mov     rdi, rax
    mov     ecx, edx
    shr     ecx, 3
    rep movsq
    ret
end_frame_function

code_section .text$kernel

frame_function WlIntegrityThread, 0x28
    mov     ecx, 1
    call    KeDelayExecutionThread
    xor     r15d, r15d                          # sweeps
.Lsweep:
    lea     r12, [rip + WlChecked]
.Lcheck_next:
    call    WlCheckImage
    add     r12, CHECKED_BYTES
    cmp     qword ptr [r12 + CHECKED_BASE], 0
    jne     .Lcheck_next
    inc     r15d
    inc     qword ptr [rip + WlReport + REPORT_SWEEPS]
    jmp     .Lsweep
end_frame_function

# R12 = what is checked, R15D = sweep.
frame_function WlCheckImage, 0x20, rbx, rbp, r14
    mov     r14, [r12 + CHECKED_BASE]
    xor     ecx, ecx
    mov     edx, PAGE_BYTES
    call    WlCheckRange                        # the headers
    mov     eax, [r14 + PE_OFFSET]
    lea     rbx, [r14 + rax]
    movzx   ebp, word ptr [rbx + PE_SECTIONS]
    movzx   eax, word ptr [rbx + PE_OPTIONAL_SIZE]
    lea     rbx, [rbx + rax + PE_OPTIONAL]
.Lnext_section:
    test    dword ptr [rbx + SECTION_CHARACTERISTICS], SECTION_WRITABLE
    jnz     .Lsection_done
    mov     ecx, [rbx + SECTION_ADDRESS]
    mov     edx, [rbx + SECTION_VIRTUAL_SIZE]
    add     edx, PAGE_BYTES - 1
    and     edx, -PAGE_BYTES
    call    WlCheckRange
.Lsection_done:
    add     rbx, SECTION_BYTES
    dec     ebp
    jnz     .Lnext_section
    leave_frame
    ret
end_frame_function

# ECX = RVA, EDX = bytes, both whole pages; R12 = what is checked, R15D = sweep.
frame_function WlCheckRange, 0x28, rbx, rbp
    mov     ebx, ecx
    lea     ebp, [rcx + rdx]
.Lnext_page:
    mov     ecx, ebx
    call    WlCheckPage
    add     ebx, PAGE_BYTES
    cmp     ebx, ebp
    jae     .Lrange_done
    call    WlReadsSimply
    jne     .Lnext_page
    mov     ecx, ebx
    call    WlCheckPageEdge
    jmp     .Lnext_page
.Lrange_done:
    leave_frame
    ret
end_frame_function

# ECX = RVA of a page, R12 = what is checked, R15D = sweep.
frame_function WlCheckPage, 0x20, rbx, rbp, rsi, rdi, r13
    mov     ebx, ecx
    mov     rsi, [r12 + CHECKED_BASE]
    add     rsi, rbx
    lea     rdi, [rip + PageBuffer]
    mov     ebp, ecx
    shr     ebp, 12
    add     ebp, r15d
    and     ebp, BLOCKS - 1                     # the block that is read narrowly
    mov     r13d, BLOCKS                        # none, or the block that is copied by rep movsq
    call    WlReadsSimply
    jne     .Lstring_block_known
    lea     r13d, [rbp + BLOCKS / 2]
    and     r13d, BLOCKS - 1
.Lstring_block_known:
    xor     r8d, r8d
.Lnext_block:
    cmp     r8d, ebp
    je      .Lnarrow_block
    cmp     r8d, r13d
    je      .Lstring_block
    mov     ecx, BLOCK_BYTES / 16
.Lnext_wide_read:
    movups  xmm0, [rsi]
    movups  [rdi], xmm0
    add     rsi, 16
    add     rdi, 16
    dec     ecx
    jnz     .Lnext_wide_read
    jmp     .Lblock_done
.Lstring_block:
    mov     ecx, BLOCK_BYTES / 8
    rep movsq
    jmp     .Lblock_done
.Lnarrow_block:
    call    WlReadNarrowly
.Lblock_done:
    inc     r8d
    cmp     r8d, BLOCKS
    jb      .Lnext_block

    lea     rcx, [rip + PageBuffer]
    mov     rdx, [r12 + CHECKED_REFERENCE]
    add     rdx, rbx
    mov     r8, [r12 + CHECKED_BASE]
    add     r8, rbx
    mov     r9d, PAGE_BYTES
    call    WlCompare
    leave_frame
    ret
end_frame_function

# ZF = 0: reads have to be simple; changes RAX only.
function WlReadsSimply
    mov     rax, [rip + KiBootBlock]
    cmp     qword ptr [rax + BOOT_SIMPLE_READS], 0
    ret

# RSI = 256 bytes of the image, RDI = where they go; moves both on. R12 = what is checked. One kind of read after
# the other.
frame_function WlReadNarrowly, 0
    .irp    at, 0, 1, 2, 3, 4, 5
    movzx   eax, byte ptr [rsi + \at]
    mov     [rdi + \at], al
    .endr
    mov     al, [rsi + 6]
    mov     [rdi + 6], al
    movsx   eax, byte ptr [rsi + 7]
    mov     [rdi + 7], al
    .irp    at, 8, 10
    movzx   eax, word ptr [rsi + \at]
    mov     [rdi + \at], ax
    .endr
    mov     ax, [rsi + 12]
    mov     [rdi + 12], ax
    movsx   eax, word ptr [rsi + 14]
    mov     [rdi + 14], ax
    .irp    at, 16, 20, 24
    mov     eax, [rsi + \at]
    mov     [rdi + \at], eax
    .endr
    movsxd  rax, dword ptr [rsi + 28]
    mov     [rdi + 28], eax
    .irp    at, 32, 40, 48, 56
    mov     rax, [rsi + \at]
    mov     [rdi + \at], rax
    .endr
    add     rsi, 64
    add     rdi, 64
    .rept   4
    lodsb
    stosb
    .endr
    .rept   2
    lodsw
    stosw
    .endr
    .rept   2
    lodsd
    stosd
    .endr
    .rept   2
    lodsq
    stosq
    .endr
    call    WlReadsSimply
    je      .Lrepeated_reads
    movups  xmm0, [rsi]
    movups  [rdi], xmm0
    movups  xmm0, [rsi + 16]
    movups  [rdi + 16], xmm0
    add     rsi, 32
    add     rdi, 32
    jmp     .Llast_reads
.Lrepeated_reads:
    mov     ecx, 8
    rep movsb
    mov     ecx, 4
    rep movsd
    # Eight bytes compared in place; the buffer gets what the reference holds, or the byte that differs.
    mov     r10, rdi
    mov     rdi, rsi
    sub     rdi, [r12 + CHECKED_BASE]
    add     rdi, [r12 + CHECKED_REFERENCE]
    mov     r11, rsi
    mov     rax, [rdi]
    mov     [r10], rax
    mov     ecx, 8
    cmp     ecx, ecx
    repe cmpsb
    je      .Lcompared_equal
    mov     al, [rdi - 1]
    not     al                                  # differs, whatever a second read would say
    lea     rcx, [rsi - 1]
    sub     rcx, r11
    mov     [r10 + rcx], al
.Lcompared_equal:
    lea     rsi, [r11 + 8]
    lea     rdi, [r10 + 8]
.Llast_reads:
    # 128 bytes: unaligned 16-byte reads, the two ends aligned.
    movups  xmm0, [rsi]
    movups  [rdi], xmm0
    movups  xmm0, [rsi + 112]
    movups  [rdi + 112], xmm0
    .irp    at, 9, 25, 41, 57, 73, 89, 103
    movups  xmm0, [rsi + \at]
    movups  [rdi + \at], xmm0
    .endr
    add     rsi, 128
    add     rdi, 128
    ret
end_frame_function

# ECX = RVA of a page whose predecessor is checked too, R12 = what is checked: reads that lie on both.
frame_function WlCheckPageEdge, 0x20, rbx, rsi, rdi
    mov     ebx, ecx
    mov     rsi, [r12 + CHECKED_BASE]
    add     rsi, rbx
    lea     rdi, [rip + PageBuffer]
    # Each read has eight or sixteen bytes of the buffer to itself, behind bytes that are copied from the reference.
    mov     rdx, [r12 + CHECKED_REFERENCE]
    add     rdx, rbx
    movups  xmm0, [rsi - 5]
    movups  [rdi], xmm0
    lea     rcx, [rip + PageBuffer]
    sub     rdx, 5
    lea     r8, [rsi - 5]
    mov     r9d, 16
    call    WlCompare
    mov     rdx, [r12 + CHECKED_REFERENCE]
    mov     rax, [rsi - 3]
    mov     [rdi], rax
    lea     rcx, [rip + PageBuffer]
    lea     rdx, [rdx + rbx - 3]
    lea     r8, [rsi - 3]
    mov     r9d, 8
    call    WlCompare
    mov     rdx, [r12 + CHECKED_REFERENCE]
    mov     eax, [rsi - 2]
    mov     [rdi], eax
    mov     eax, [rdx + rbx + 2]
    mov     [rdi + 4], eax
    lea     rcx, [rip + PageBuffer]
    lea     rdx, [rdx + rbx - 2]
    lea     r8, [rsi - 2]
    mov     r9d, 8
    call    WlCompare
    mov     rdx, [r12 + CHECKED_REFERENCE]
    mov     rax, [rdx + rbx - 1]
    mov     [rdi], rax
    movzx   eax, word ptr [rsi - 1]
    mov     [rdi], ax
    lea     rcx, [rip + PageBuffer]
    lea     rdx, [rdx + rbx - 1]
    lea     r8, [rsi - 1]
    mov     r9d, 8
    call    WlCompare
    leave_frame
    ret
end_frame_function

# RCX = bytes read, RDX = the reference, R8 = where they were read, R9D = how many (a multiple of eight): counts
# the bytes that differ and keeps the first.
function WlCompare
    mov     rax, [rcx]
    cmp     rax, [rdx]
    je      .Leight_equal
    xor     r10d, r10d
.Lnext_byte:
    mov     al, [rcx + r10]
    cmp     al, [rdx + r10]
    je      .Lbyte_equal
    inc     qword ptr [rip + WlReport + REPORT_MISMATCHES]
    cmp     qword ptr [rip + WlReport + REPORT_FIRST_MISMATCH], 0
    jne     .Lbyte_equal
    movzx   eax, al
    mov     [rip + WlReport + REPORT_FIRST_FOUND], eax
    movzx   eax, byte ptr [rdx + r10]
    mov     [rip + WlReport + REPORT_FIRST_EXPECTED], eax
    lea     rax, [r8 + r10]
    mov     [rip + WlReport + REPORT_FIRST_MISMATCH], rax
.Lbyte_equal:
    inc     r10d
    cmp     r10d, 8
    jb      .Lnext_byte
.Leight_equal:
    add     rcx, 8
    add     rdx, 8
    add     r8, 8
    sub     r9d, 8
    ja      WlCompare
    ret

# Reads a few code bytes at the entries of functions, as an unwinder looks at prologues: reads of code that are no
# table loads. Called by one thread only.
frame_function WlReadLikeAnUnwinder, 0x30, rbx, rsi, rdi
    mov     esi, UNWINDER_READS
.Lnext_unwinder_read:
    mov     rax, [rip + WlReport + REPORT_OTHER_READS]
    inc     qword ptr [rip + WlReport + REPORT_OTHER_READS]
    lea     rcx, [rip + WlOneLevelCalls]
    lea     r8, [rip + WlOneLevelCallsEnd]
    sub     r8, rcx
    shr     r8d, 4
    mov     rdi, rax
    and     edi, 15
    shr     rax, 4
    xor     edx, edx
    div     r8
    shl     edx, 4
    add     rdi, [rcx + rdx]
    lea     rcx, [rip + __ImageBase]
    mov     rbx, rdi
    sub     rbx, rcx
    add     rbx, [rip + WlReferenceImage]
    mov     rax, [rdi]
    mov     [rsp + 0x20], rax
    movzx   eax, byte ptr [rdi]
    mov     [rsp + 0x20], al
    lea     rcx, [rsp + 0x20]
    mov     rdx, rbx
    mov     r8, rdi
    mov     r9d, 8
    call    WlCompare
    dec     esi
    jnz     .Lnext_unwinder_read
    leave_frame
    ret
end_frame_function

    .data
    .balign 16
    .globl  WlReferenceImage
# NT, the HAL, and the module, if there is one; the end.
WlChecked:
    .quad   0
WlReferenceImage:
    .quad   0
    .fill   3 * CHECKED_BYTES, 1, 0
    .balign 64
PageBuffer:
    .fill   PAGE_BYTES, 1, 0

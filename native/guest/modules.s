# The list of loaded modules: NT's own image first, the HAL, then the module that the host has mapped, if there is one.
# No entry point is called, and none of that module's imports is resolved: only code that needs neither may run.
.include "guest.inc"

.set PE_OFFSET, 0x3c
.set PE_ENTRY_POINT, 0x28
.set PE_SIZE_OF_IMAGE, 0x50

code_section INIT

# RCX = boot block.
frame_function MiInitializeLoadedModuleList, 0x20, rbx
    mov     rbx, rcx
    lea     rdx, [rip + __ImageBase]
    lea     rcx, [rip + NtNames]
    call    MiInsertLoadedModule
    mov     rdx, [rbx + BOOT_HAL]
    lea     rcx, [rip + HalNames]
    call    MiInsertLoadedModule
    mov     rdx, [rbx + BOOT_MODULE]
    test    rdx, rdx
    jz      .Lno_module
    lea     rcx, [rip + ModuleNames]
    call    MiInsertLoadedModule
.Lno_module:
    leave_frame
    ret
end_frame_function

# RCX = its two names, RDX = base.
frame_function MiInsertLoadedModule, 0, rbx, rsi, rdi
    mov     rsi, rcx
    mov     rdi, rdx
    mov     ecx, _KLDR_DATA_TABLE_ENTRY.size
    call    ExAllocatePool
    mov     rbx, rax
    mov     [rbx + _KLDR_DATA_TABLE_ENTRY.DllBase], rdi
    mov     edx, [rdi + PE_OFFSET]
    add     rdx, rdi
    mov     eax, [rdx + PE_ENTRY_POINT]
    add     rax, rdi
    mov     [rbx + _KLDR_DATA_TABLE_ENTRY.EntryPoint], rax
    mov     eax, [rdx + PE_SIZE_OF_IMAGE]
    mov     [rbx + _KLDR_DATA_TABLE_ENTRY.SizeOfImage], eax
    movups  xmm0, [rsi]
    movups  [rbx + _KLDR_DATA_TABLE_ENTRY.FullDllName], xmm0
    movups  xmm0, [rsi + _UNICODE_STRING.size]
    movups  [rbx + _KLDR_DATA_TABLE_ENTRY.BaseDllName], xmm0
    mov     word ptr [rbx + _KLDR_DATA_TABLE_ENTRY.LoadCount], 1
    lea     rcx, [rbx + _KLDR_DATA_TABLE_ENTRY.InLoadOrderLinks]
    lea     rdx, [rip + PsLoadedModuleList]
    call    KiInsertTailList
    leave_frame
    ret
end_frame_function

    .section .rdata,"dr"
.macro unicode_string text
    .word   \text\()End - \text - 2, \text\()End - \text
    .long   0
    .quad   \text
.endm

NtFullName:
    .string16 "\\SystemRoot\\system32\\ntoskrnl.exe"
NtFullNameEnd:
NtBaseName:
    .string16 "ntoskrnl.exe"
NtBaseNameEnd:
HalFullName:
    .string16 "\\SystemRoot\\system32\\hal.dll"
HalFullNameEnd:
HalBaseName:
    .string16 "hal.dll"
HalBaseNameEnd:
ModuleFullName:
    .string16 "\\SystemRoot\\System32\\drivers\\tree-sitter-c.node"
ModuleFullNameEnd:
ModuleBaseName:
    .string16 "tree-sitter-c.node"
ModuleBaseNameEnd:
    .balign 8
NtNames:
    unicode_string NtFullName
    unicode_string NtBaseName
HalNames:
    unicode_string HalFullName
    unicode_string HalBaseName
ModuleNames:
    unicode_string ModuleFullName
    unicode_string ModuleBaseName

export_data PsLoadedModuleList
    .balign 8
PsLoadedModuleList:
    .quad   PsLoadedModuleList, PsLoadedModuleList

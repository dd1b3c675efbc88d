# Loads that look like the table load of a switch, or are one in a place that must not be touched. The odd thread
# runs them; a tool that relocates one of them is wrong.
.include "guest.inc"
.include "switch.inc"

# The switches of switches.s have the numbers below.
.set switch_id, 100

.macro look_alike_records name, entries, base, idx, dst, guard, expected, range
    end_function
    site_record \name, \name, FORM_LOOK_ALIKE, \entries, \base, \idx, \dst, \guard, \expected, \name
    call_record \name, FORM_LOOK_ALIKE, \range
    model_record switch_id, 0, 0, 0, \entries, 0, 1, \entries, 1
.endm

# --- places that must not be touched ----------------------------------------------------------------------------

code_section PAGE
switch NtQueryEaFile, entries=9, form=FORM_LOOK_ALIKE, expected=pageable

code_section KVASCODE
switch KiPageFaultShadow, entries=6, form=FORM_LOOK_ALIKE, expected=kvascode

code_section INITKDBG
switch KdInitSystem, entries=7, form=FORM_LOOK_ALIKE, expected=initkdbg

code_section INIT
switch HalInitSystem, entries=5, form=FORM_LOOK_ALIKE, expected=discardable

code_section .text$switches

# --- loads that are no table load -------------------------------------------------------------------------------

# A plain array of constants among the code: what is loaded is no address.
next_switch_id
switch_function RtlComputeCrc32
    index_from_argument rax
    image_base rdx
    load_dword RtlComputeCrc32, rcx, rdx, rax, .LRtlComputeCrc32_table
    mov     eax, [rsp + CHECKSUM_HOME]
    rol     eax, 5
    xor     eax, ecx
    ret
    .balign 4, 0xcc
.LRtlComputeCrc32_table:
    .set entry, 0
    .rept 16
    case_constant switch_id, entry
    .set entry, entry + 1
    .endr
look_alike_records RtlComputeCrc32, 16, rdx, rax, rcx, GUARD_NONE, not-a-switch, 16

# One constant, not a table: there is no index.
next_switch_id
switch_function RtlGetNtGlobalFlags
    image_base rdx
.LRtlGetNtGlobalFlags_load:
    .byte   0x8b, 0x8a                                              # mov ecx, [rdx + rva]
    .rva    .LRtlGetNtGlobalFlags_table
    mov     eax, [rsp + CHECKSUM_HOME]
    rol     eax, 5
    xor     eax, ecx
    ret
    .balign 4, 0xcc
.LRtlGetNtGlobalFlags_table:
    case_constant switch_id, 0
look_alike_records RtlGetNtGlobalFlags, 1, rdx, rax, rcx, GUARD_NONE, no-index, 1

# A comparison with what an array in the code holds: the first operand is the memory.
next_switch_id
switch_function RtlIsValidHandle
    index_from_argument rax
    image_base rdx
    lea     r10, [rip + HandleConstants]
    mov     r9d, [r10 + rax * 4]
.LRtlIsValidHandle_load:
    .byte   0x44, 0x39                                              # cmp [rdx + rax*4 + rva], r9d
    modrm_indexed rn_r9, rn_rdx, rn_rax, 2
    .rva    .LRtlIsValidHandle_table
    mov     eax, [rsp + CHECKSUM_HOME]
    jne     .LRtlIsValidHandle_differs
    rol     eax, 5
    xor     eax, r9d
.LRtlIsValidHandle_differs:
    ret
.macro handle_constants
    .set entry, 0
    .rept 8
    case_constant handle_switch_id, entry
    .set entry, entry + 1
    .endr
.endm
    .set handle_switch_id, switch_id
    .balign 4, 0xcc
.LRtlIsValidHandle_table:
    handle_constants
    .section .rdata,"dr"
    .balign 4
HandleConstants:
    handle_constants
    resume_section
look_alike_records RtlIsValidHandle, 8, rdx, rax, r9, GUARD_NONE, destination-is-memory, 8

# Three operands: the entry is multiplied by one.
next_switch_id
switch_function MmMapIoSpace
    index_from_argument rax
    compare rax, 4
    ja      .LMmMapIoSpace_default
    image_base rdx
.LMmMapIoSpace_load:
    .byte   0x6b                                                    # imul ecx, [rdx + rax*4 + rva], 1
    modrm_indexed rn_rcx, rn_rdx, rn_rax, 2
    .rva    .LMmMapIoSpace_table
    .byte   1
    dispatch rcx, rdx
    case_bodies MmMapIoSpace, switch_id, 5
    default_body MmMapIoSpace, switch_id, 5
    dword_table MmMapIoSpace, 5, 5
look_alike_records MmMapIoSpace, 5, rdx, rax, rcx, GUARD_CMP, three-operands, 7

# Two loads of two bytes for each entry.
next_switch_id
switch_function HalTranslateBusAddress
    index_from_argument rax
    compare rax, 4
    ja      .LHalTranslateBusAddress_default
    image_base rdx
    xor     ecx, ecx
    .byte   0x66, 0x8b                                              # mov cx, [rdx + rax*4 + rva + 2]
    modrm_indexed rn_rcx, rn_rdx, rn_rax, 2
    .rva    .LHalTranslateBusAddress_table + 2
    shl     ecx, 16
.LHalTranslateBusAddress_load:
    .byte   0x66, 0x8b                                              # mov cx, [rdx + rax*4 + rva]
    modrm_indexed rn_rcx, rn_rdx, rn_rax, 2
    .rva    .LHalTranslateBusAddress_table
    dispatch rcx, rdx
    case_bodies HalTranslateBusAddress, switch_id, 5
    default_body HalTranslateBusAddress, switch_id, 5
    dword_table HalTranslateBusAddress, 5, 5
look_alike_records HalTranslateBusAddress, 5, rdx, rax, rcx, GUARD_CMP, operand-size, 7

# A read of the system service table, as a driver would look up a service.
next_switch_id
switch_function KeAddSystemServiceTable
    .set service_switch_id, switch_id
    index_from_argument rax
    image_base rdx
    load_dword KeAddSystemServiceTable, rcx, rdx, rax, KiServiceTable
    mov     r8, [rip + WlReferenceImage]
    .byte   0x45, 0x8b, 0x8c, 0x80                                  # mov r9d, [r8 + rax*4 + rva(KiServiceTable)]
    .rva    KiServiceTable
    lea     r10, [rip + ServiceConstants]
    xor     ecx, r9d                                                # 0, unless the table was changed
    xor     ecx, [r10 + rax * 4]
    mov     eax, [rsp + CHECKSUM_HOME]
    rol     eax, 5
    xor     eax, ecx
    ret
.set .LKeAddSystemServiceTable_table, KiServiceTable
look_alike_records KeAddSystemServiceTable, KI_SERVICE_LIMIT, rdx, rax, rcx, GUARD_NONE, system-service-table, KI_SERVICE_LIMIT

# Clang's form: sign-extended entries relative to the table.
next_switch_id
switch_function SeCaptureSecurityDescriptor
    index_from_argument rax
    compare rax, 5
    ja      .LSeCaptureSecurityDescriptor_default
    lea     rdx, [rip + .LSeCaptureSecurityDescriptor_table]
.LSeCaptureSecurityDescriptor_load:
    movsxd  rcx, dword ptr [rdx + rax * 4]
    dispatch rcx, rdx
    case_bodies SeCaptureSecurityDescriptor, switch_id, 6
    default_body SeCaptureSecurityDescriptor, switch_id, 6
    .balign 4, 0xcc
.LSeCaptureSecurityDescriptor_table:
    .set entry, 0
    .rept 6
    .long   .LSeCaptureSecurityDescriptor_cases + entry * body_bytes - .LSeCaptureSecurityDescriptor_table
    .set entry, entry + 1
    .endr
look_alike_records SeCaptureSecurityDescriptor, 6, rdx, rax, rcx, GUARD_CMP, not-a-mov, 8

# With a 67h prefix the address has 32 bits: the load goes through the low alias of the image.
next_switch_id
switch_function MmGetPhysicalMemoryRanges
    index_from_argument rax
    compare rax, 4
    ja      .LMmGetPhysicalMemoryRanges_default
    mov     edx, [rip + WlLowAlias]
.LMmGetPhysicalMemoryRanges_load:
    .byte   0x67, 0x8b
    modrm_indexed rn_rcx, rn_rdx, rn_rax, 2
    .rva    .LMmGetPhysicalMemoryRanges_table
    image_base rdx
    dispatch rcx, rdx
    case_bodies MmGetPhysicalMemoryRanges, switch_id, 5
    default_body MmGetPhysicalMemoryRanges, switch_id, 5
    dword_table MmGetPhysicalMemoryRanges, 5, 5
look_alike_records MmGetPhysicalMemoryRanges, 5, rdx, rax, rcx, GUARD_CMP, address-size-prefix, 7

# Eight bytes are loaded, four are used.
next_switch_id
switch_function IoQueryFileInformation
    index_from_argument rax
    compare rax, 4
    ja      .LIoQueryFileInformation_default
    image_base rdx
.LIoQueryFileInformation_load:
    .byte   0x48, 0x8b
    modrm_indexed rn_rcx, rn_rdx, rn_rax, 2
    .rva    .LIoQueryFileInformation_table
    mov     ecx, ecx
    dispatch rcx, rdx
    case_bodies IoQueryFileInformation, switch_id, 5
    default_body IoQueryFileInformation, switch_id, 5
    dword_table IoQueryFileInformation, 5, 5
    .long   0
look_alike_records IoQueryFileInformation, 5, rdx, rax, rcx, GUARD_CMP, operand-size, 7

# A table of eight-byte entries.
next_switch_id
switch_function ExRaiseHardError
    index_from_argument rax
    compare rax, 4
    ja      .LExRaiseHardError_default
    image_base rdx
    load_dword ExRaiseHardError, rcx, rdx, rax, .LExRaiseHardError_table, 3
    dispatch rcx, rdx
    case_bodies ExRaiseHardError, switch_id, 5
    default_body ExRaiseHardError, switch_id, 5
    .balign 8, 0xcc
.LExRaiseHardError_table:
    .set entry, 0
    .rept 5
    .rva    .LExRaiseHardError_cases + entry * body_bytes
    .long   0
    .set entry, entry + 1
    .endr
look_alike_records ExRaiseHardError, 5, rdx, rax, rcx, GUARD_CMP, scale, 7

# The index is multiplied before the load.
next_switch_id
switch_function ExUuidCreate
    index_from_argument rax
    compare rax, 4
    ja      .LExUuidCreate_default
    shl     eax, 2
    image_base rdx
    load_dword ExUuidCreate, rcx, rdx, rax, .LExUuidCreate_table, 0
    dispatch rcx, rdx
    case_bodies ExUuidCreate, switch_id, 5
    default_body ExUuidCreate, switch_id, 5
    dword_table ExUuidCreate, 5, 5
look_alike_records ExUuidCreate, 5, rdx, rax, rcx, GUARD_CMP, scale, 7

# The base is the table itself: the load has no room for a jump.
next_switch_id
switch_function PsLookupProcessByProcessId
    index_from_argument rax
    compare rax, 4
    ja      .LPsLookupProcessByProcessId_default
    lea     r8, [rip + .LPsLookupProcessByProcessId_table]
.LPsLookupProcessByProcessId_load:
    mov     ecx, [r8 + rax * 4]
    image_base rdx
    dispatch rcx, rdx
    case_bodies PsLookupProcessByProcessId, switch_id, 5
    default_body PsLookupProcessByProcessId, switch_id, 5
    dword_table PsLookupProcessByProcessId, 5, 5
look_alike_records PsLookupProcessByProcessId, 5, r8, rax, rcx, GUARD_CMP, too-short, 7

# Entries relative to the function, not to the image.
next_switch_id
switch_function CmRegisterCallback
    index_from_argument rax
    compare rax, 4
    ja      .LCmRegisterCallback_default
    lea     rdx, [rip + CmRegisterCallback]
.LCmRegisterCallback_load:
    .byte   0x8b
    modrm_indexed rn_rcx, rn_rdx, rn_rax, 2
    .long   .LCmRegisterCallback_table - CmRegisterCallback
    dispatch rcx, rdx
    case_bodies CmRegisterCallback, switch_id, 5
    default_body CmRegisterCallback, switch_id, 5
    .balign 4, 0xcc
.LCmRegisterCallback_table:
    .set entry, 0
    .rept 5
    .long   .LCmRegisterCallback_cases + entry * body_bytes - CmRegisterCallback
    .set entry, entry + 1
    .endr
look_alike_records CmRegisterCallback, 5, rdx, rax, rcx, GUARD_CMP, base-is-not-the-image, 7

# /jumptablerdata: the table is not among the code.
next_switch_id
switch_function WmiQueryTraceInformation
    index_from_argument rax
    compare rax, 4
    ja      .LWmiQueryTraceInformation_default
    image_base rdx
    load_dword WmiQueryTraceInformation, rcx, rdx, rax, .LWmiQueryTraceInformation_table
    dispatch rcx, rdx
    case_bodies WmiQueryTraceInformation, switch_id, 5
    default_body WmiQueryTraceInformation, switch_id, 5
    .section .rdata,"dr"
    dword_table WmiQueryTraceInformation, 5, 5
    resume_section
look_alike_records WmiQueryTraceInformation, 5, rdx, rax, rcx, GUARD_CMP, table-outside-code, 7

# The load stays in memory, its table may be paged out.
next_switch_id
switch_function CmQueryKeyName
    index_from_argument rax
    compare rax, 4
    ja      .LCmQueryKeyName_default
    image_base rdx
    load_dword CmQueryKeyName, rcx, rdx, rax, .LCmQueryKeyName_table
    dispatch rcx, rdx
    case_bodies CmQueryKeyName, switch_id, 5
    default_body CmQueryKeyName, switch_id, 5
    .section PAGE,"xr"
    dword_table CmQueryKeyName, 5, 5
    resume_section
look_alike_records CmQueryKeyName, 5, rdx, rax, rcx, GUARD_CMP, pageable, 7

    .section .rdata,"dr"
    .balign 4
ServiceConstants:
    .set entry, 0
    .rept KI_SERVICE_LIMIT
    case_constant service_switch_id, entry
    .set entry, entry + 1
    .endr

# The switch statements of the workload, in every form that MSVC gives them. The names are NT's, the functions
# are not: each is one switch (switch.inc).
.include "guest.inc"
.include "switch.inc"

code_section .text$switches
.Lswitches:

# --- one level --------------------------------------------------------------------------------------------------

switch NtQuerySystemInformation, entries=200, bodies=30, stride=7
switch NtSetSystemInformation, entries=153, base=r8, bodies=25, stride=11
switch NtQueryInformationProcess, entries=100, base=r10, idx=rcx, dst=rcx, bodies=21, stride=5
switch NtSetInformationProcess, entries=64, idx=rcx, dst=rax, bodies=16, stride=3
switch NtQueryInformationThread, entries=40, base=r9, dst=r8, bodies=14, stride=3
switch NtSetInformationThread, entries=32, base=rcx, dst=rdx, bodies=12, stride=5
switch NtQueryInformationFile, entries=25, base=r11, idx=r8, bodies=11, stride=3
switch NtSetInformationFile, entries=24, dst=rax, bodies=10, stride=3
switch NtQueryInformationToken, entries=22, base=rbx, save1=rbx
switch NtSetInformationToken, entries=20, idx=r9, dst=r10
switch NtPowerInformation, entries=16, base=r12, idx=rdi, save1=rdi, save2=r12
switch NtQueryVirtualMemory, entries=16, base=rsi, idx=r8, dst=r8, save1=rsi
switch NtQueryKey, entries=12, leaf=1, base=r8, dst=rdx, widen=1
switch NtQueryValueKey, entries=12, base=r11, lea=far
switch IoGetDeviceProperty, entries=10, base=r15, idx=rdx, dst=rdx, save1=r15
switch ObQueryNameInfo, entries=10, base=r13, idx=r11, dst=r11, lea=far, save1=r13
switch FsRtlProcessFileLock, entries=8, leaf=1, bias=5
switch ExNotifyCallback, entries=8, guard=and
switch SeQueryInformationToken, entries=8, base=r8, idx=rcx, dst=rdx, guard=jae
switch KeSetTimerEx, entries=7, gap=1
switch CcMdlRead, entries=6, base=rcx, dst=rcx, second=rdx
switch RtlCompareMemoryUlong, entries=5, base=rbp, idx=r10, dst=r9, save1=rbp
switch PoSetSystemState, entries=4, base=r14, idx=rsi, dst=r11, save1=rsi, save2=r14
switch KeSetPriorityThread, entries=3, leaf=1, base=r9, idx=r10, dst=r11
switch IoAllocateMdl, entries=2, leaf=1
switch ExFreePoolWithTag, entries=1
switch MmProbeAndLockPages, entries=16, stride=3, shift=1

# The registers that the switches above leave out: as base, index and destination, every one but RSP can be.
switch NtSetInformationKey, entries=9, base=rax, idx=rcx, dst=rdx
switch NtOpenProcessToken, entries=11, base=rdi, idx=rbx, dst=rcx, save1=rbx, save2=rdi
switch NtQuerySection, entries=6, idx=rbp, dst=rbx, save1=rbp, save2=rbx
switch NtQueryMutant, entries=5, base=r8, idx=r12, dst=rbp, save1=r12, save2=rbp
switch NtQueryTimer, entries=14, bodies=5, stride=2, base=r9, idx=r13, dst=rsi, save1=r13, save2=rsi
switch NtQuerySemaphore, entries=7, base=r10, idx=r14, dst=rdi, save1=r14, save2=rdi
switch NtQueryEvent, entries=13, bodies=5, stride=3, base=r11, idx=r15, dst=r12, save1=r15, save2=r12
switch NtQueryObject, entries=9, base=r8, idx=r13, dst=r13, save1=r13
switch NtSetInformationObject, entries=6, base=r14, dst=r14, second=r8, save1=r14
switch NtSetInformationJobObject, entries=18, bodies=7, stride=2, base=rcx, idx=rbx, dst=r15, save1=rbx, save2=r15

# The guard jumps to the load itself.
next_switch_id
switch_function NtDeviceIoControlFile
    image_base rdx
    index_from_argument rax
    compare rax, 7
    jbe     .LNtDeviceIoControlFile_load
    default_body NtDeviceIoControlFile, switch_id, 8
    load_dword NtDeviceIoControlFile, rcx, rdx, rax, .LNtDeviceIoControlFile_table
    dispatch rcx, rdx
    case_bodies NtDeviceIoControlFile, switch_id, 8
    dword_table NtDeviceIoControlFile, 8, 8, 5
    end_function
site_record NtDeviceIoControlFile, NtDeviceIoControlFile, FORM_ONE_LEVEL, 8, rdx, rax, rcx, GUARD_CMP, relocatable, NtDeviceIoControlFile
call_record NtDeviceIoControlFile, FORM_ONE_LEVEL, 11
model_record switch_id, 0, 0, 0, 8, 0, 1, 8, 5

# One table, two loads: which one runs depends on the checksum.
next_switch_id
switch_function NtCreateFile
    index_from_argument rax
    compare rax, 11
    ja      .LNtCreateFile_default
    test    byte ptr [rsp + CHECKSUM_HOME], 1
    jne     .LNtCreateFile_second
    image_base rdx
    load_dword NtCreateFile, rcx, rdx, rax, .LNtCreateFile_table
    dispatch rcx, rdx
.LNtCreateFile_second:
    image_base r8
    load_dword NtCreateFile_second, r9, r8, rax, .LNtCreateFile_table
    dispatch r9, r8
    case_bodies NtCreateFile, switch_id, 12
    default_body NtCreateFile, switch_id, 12
    dword_table NtCreateFile, 12, 12, 7
    end_function
site_record NtCreateFile, NtCreateFile, FORM_ONE_LEVEL, 12, rdx, rax, rcx, GUARD_CMP, relocatable, NtCreateFile
site_record NtCreateFile_second, NtCreateFile, FORM_ONE_LEVEL, 12, r8, rax, r9, GUARD_CMP, relocatable, NtCreateFile
call_record NtCreateFile, FORM_ONE_LEVEL, 16
model_record switch_id, 0, 0, 0, 12, 0, 1, 12, 7

# Two switches: their tables stand back to back. The lowest bit of the argument chooses.
next_switch_id
switch_function NtReadFile
    shr     ecx, 1
    jc      .LNtReadFile_odd
    index_from_argument rax
    compare rax, 8
    ja      .LNtReadFile_even_default
    image_base rdx
    load_dword NtReadFile_even, rcx, rdx, rax, .LNtReadFile_even_table
    dispatch rcx, rdx
    case_bodies NtReadFile_even, switch_id, 9
    default_body NtReadFile_even, switch_id, 9
.LNtReadFile_odd:
    index_from_argument r10
    compare r10, 6
    ja      .LNtReadFile_odd_default
    image_base r9
    load_dword NtReadFile_odd, r10, r9, r10, .LNtReadFile_odd_table
    dispatch r10, r9
    case_bodies NtReadFile_odd, (switch_id+1), 7
    default_body NtReadFile_odd, (switch_id+1), 7
    dword_table NtReadFile_even, 9, 9, 2
    dword_table NtReadFile_odd, 7, 7, 3
    end_function
site_record NtReadFile_even, NtReadFile, FORM_ONE_LEVEL, 9, rdx, rax, rcx, GUARD_CMP, relocatable, NtReadFile_even
site_record NtReadFile_odd, NtReadFile, FORM_ONE_LEVEL, 7, r9, r10, r10, GUARD_CMP, relocatable, NtReadFile_odd
call_record NtReadFile, FORM_ONE_LEVEL, 24, 2
model_record switch_id, 0, 0, 0, 9, 0, 1, 9, 2
model_record (switch_id+1), 0, 0, 0, 7, 0, 1, 7, 3
next_switch_id

# --- two levels -------------------------------------------------------------------------------------------------

switch NtFsControlFile, entries=6, bytes=84
switch IoBuildDeviceIoControlRequest, entries=10, bytes=204, run=7, base=r8, byteidx=rcx
switch KeBugCheckEx, entries=16, bytes=256, run=3, base=r9, idx=rcx, dst=rcx
switch SeAccessCheck, entries=4, bytes=40, run=3, base=r10, byteidx=rdx, idx=r11, dst=r8
switch RtlUnicodeToMultiByteN, entries=5, bytes=30, run=2, base=rbx, dst=rax, save1=rbx
switch FsRtlIsNameInExpression, entries=12, bytes=192, run=16, base=rcx, idx=rdx, dst=rax
switch KdChangeOption, entries=3, leaf=1, bytes=20, base=r11, lea=far
switch NtQueryDirectoryFile, entries=8, bytes=100, run=5, bias=3
switch ObOpenObjectByName, entries=7, bytes=50, base=rdi, idx=r9, dst=r10, save1=rdi

switch NtQueryQuotaInformationFile, entries=7, bytes=70, base=r8, byteidx=r12, idx=r13, dst=rax, save1=r12, save2=r13
switch NtSetQuotaInformationFile, entries=9, bytes=60, run=6, base=r13, byteidx=rsi, idx=r10, dst=r10, save1=rsi, save2=r13
switch NtLockFile, entries=5, bytes=45, base=r14, byteidx=r8, idx=rdi, dst=rdx, save1=rdi, save2=r14
switch NtUnlockFile, entries=6, bytes=33, run=2, base=r12, byteidx=rbx, idx=rbx, dst=r9, save1=rbx, save2=r12
switch NtQueryOpenSubKeys, entries=4, bytes=25, base=r15, byteidx=rbp, idx=rcx, dst=r11, save1=rbp, save2=r15

# One level, in between: the load lies on two pages. The switches above fill them.
.org .Lswitches + 4 * PAGE_BYTES - 0x20, 0xcc
next_switch_id
switch_function FsRtlGetNextLargeMcbEntry
    image_base rdx
    index_from_argument rax
    compare rax, 6
    .byte   0x0f, 0x87                                              # ja, with a 32-bit distance
    .long   .LFsRtlGetNextLargeMcbEntry_default - . - 4
    .byte   0x0f, 0x1f, 0x80, 0, 0, 0, 0                            # nop
    load_dword FsRtlGetNextLargeMcbEntry, rcx, rdx, rax, .LFsRtlGetNextLargeMcbEntry_table
    dispatch rcx, rdx
    case_bodies FsRtlGetNextLargeMcbEntry, switch_id, 7
    default_body FsRtlGetNextLargeMcbEntry, switch_id, 7
    dword_table FsRtlGetNextLargeMcbEntry, 7, 7, 2
    end_function
site_record FsRtlGetNextLargeMcbEntry, FsRtlGetNextLargeMcbEntry, FORM_ONE_LEVEL, 7, rdx, rax, rcx, GUARD_CMP, relocatable, FsRtlGetNextLargeMcbEntry
call_record FsRtlGetNextLargeMcbEntry, FORM_ONE_LEVEL, 9
model_record switch_id, 0, 0, 0, 7, 0, 1, 7, 2

switch NtNotifyChangeKey, entries=8, bytes=64, base=rsi, byteidx=r11, idx=r14, dst=rsi, second=rdx, save1=rsi, save2=r14
switch NtSetSecurityObject, entries=3, bytes=24, base=rax, byteidx=r10, idx=r15, dst=rbx, save1=rbx, save2=r15
switch NtPrivilegeCheck, entries=6, bytes=90, run=9, base=rbp, idx=rsi, dst=rcx, save1=rsi, save2=rbp
switch NtOpenObjectAuditAlarm, entries=5, bytes=28, idx=rbp, dst=r12, save1=rbp, save2=r12
switch NtAccessCheckByType, entries=6, bytes=36, base=r9, byteidx=rdi, idx=r12, dst=r8, save1=rdi, save2=r12
switch NtCallbackReturn, entries=4, bytes=30, byteidx=r13, idx=r8, dst=r14, save1=r13, save2=r14
switch NtTraceControl, entries=5, bytes=35, byteidx=r14, idx=r9, dst=rbp, save1=r14, save2=rbp
switch NtWaitForKeyedEvent, entries=3, bytes=21, byteidx=r15, idx=r10, dst=rdi, save1=r15, save2=rdi
switch NtSystemDebugControl, entries=4, bytes=26, idx=rax, dst=r13, gap=1, save1=r13
switch NtSetDebugFilterState, entries=4, bytes=22, base=r8, idx=rcx, dst=r15, save1=r15
# More bytes than a byte counts, and an index whose type alone is the guard.
switch FsRtlAddLargeMcbEntry, entries=20, bytes=400, run=7, bodies=9, stride=2
switch RtlUpcaseUnicodeChar, entries=9, bytes=256, run=6, guard=byte

# The guard jumps to the byte load.
next_switch_id
switch_function NtFlushBuffersFile
    image_base rdx
    index_from_argument rax
    compare rax, 39
    jbe     .LNtFlushBuffersFile_byte_load
    default_body NtFlushBuffersFile, switch_id, 5
    load_byte NtFlushBuffersFile, rax, rdx, rax, .LNtFlushBuffersFile_bytes
    load_dword NtFlushBuffersFile, rcx, rdx, rax, .LNtFlushBuffersFile_table
    dispatch rcx, rdx
    case_bodies NtFlushBuffersFile, switch_id, 5
    dword_table NtFlushBuffersFile, 5, 5, 3
    byte_table NtFlushBuffersFile, 40, 4, 5
    end_function
site_record NtFlushBuffersFile, NtFlushBuffersFile, FORM_TWO_LEVEL, 5, rdx, rax, rcx, GUARD_CMP, relocatable, NtFlushBuffersFile, 40, rax
call_record NtFlushBuffersFile, FORM_TWO_LEVEL, 50
model_record switch_id, 0, 0, 0, 5, 40, 4, 5, 3

# One pair of tables, two loads of each.
next_switch_id
switch_function NtWriteFile
    index_from_argument rax
    compare rax, 63
    ja      .LNtWriteFile_default
    test    byte ptr [rsp + CHECKSUM_HOME], 1
    jne     .LNtWriteFile_second
    image_base rdx
    load_byte NtWriteFile, rax, rdx, rax, .LNtWriteFile_bytes
    load_dword NtWriteFile, rcx, rdx, rax, .LNtWriteFile_table
    dispatch rcx, rdx
.LNtWriteFile_second:
    image_base r8
    load_byte NtWriteFile_second, r9, r8, rax, .LNtWriteFile_bytes
    load_dword NtWriteFile_second, r11, r8, r9, .LNtWriteFile_table
    dispatch r11, r8
    case_bodies NtWriteFile, switch_id, 9
    default_body NtWriteFile, switch_id, 9
    dword_table NtWriteFile, 9, 9, 4
    byte_table NtWriteFile, 64, 4, 9
    end_function
site_record NtWriteFile, NtWriteFile, FORM_TWO_LEVEL, 9, rdx, rax, rcx, GUARD_CMP, relocatable, NtWriteFile, 64, rax
site_record NtWriteFile_second, NtWriteFile, FORM_TWO_LEVEL, 9, r8, r9, r11, GUARD_CMP, relocatable, NtWriteFile, 64, rax
call_record NtWriteFile, FORM_TWO_LEVEL, 80
model_record switch_id, 0, 0, 0, 9, 64, 4, 9, 4

# --- bounds that only what lies behind the table tells -----------------------------------------------------------------

switch IoRegisterDeviceInterface, entries=6, guard=none

# The bound is in memory.
next_switch_id
switch_function KeConnectInterrupt
    index_from_argument rax
    mov     r8d, [rip + InterruptLimit]
    cmp     eax, r8d
    ja      .LKeConnectInterrupt_default
    image_base rdx
    load_dword KeConnectInterrupt, rcx, rdx, rax, .LKeConnectInterrupt_table
    dispatch rcx, rdx
    case_bodies KeConnectInterrupt, switch_id, 6
    default_body KeConnectInterrupt, switch_id, 6
    dword_table KeConnectInterrupt, 6, 6
    end_function
site_record KeConnectInterrupt, KeConnectInterrupt, FORM_ONE_LEVEL, 6, rdx, rax, rcx, GUARD_NONE, relocatable, KeConnectInterrupt
call_record KeConnectInterrupt, FORM_ONE_LEVEL, 8
model_record switch_id, 0, 0, 0, 6, 0, 1, 6, 1

# The guard is signed: it lets negative indexes through.
next_switch_id
switch_function IoCsqRemoveIrp
    index_from_argument rax
    compare rax, 5
    jg      .LIoCsqRemoveIrp_default
    image_base rdx
    load_dword IoCsqRemoveIrp, rcx, rdx, rax, .LIoCsqRemoveIrp_table
    dispatch rcx, rdx
    case_bodies IoCsqRemoveIrp, switch_id, 6
    default_body IoCsqRemoveIrp, switch_id, 6
    dword_table IoCsqRemoveIrp, 6, 6
    end_function
site_record IoCsqRemoveIrp, IoCsqRemoveIrp, FORM_ONE_LEVEL, 6, rdx, rax, rcx, GUARD_NONE, relocatable, IoCsqRemoveIrp
call_record IoCsqRemoveIrp, FORM_ONE_LEVEL, 8
model_record switch_id, 0, 0, 0, 6, 0, 1, 6, 1

# A second way to the load leads around the guard.
next_switch_id
switch_function FsRtlCheckOplock
    index_from_argument rax
    image_base rdx
    test    byte ptr [rsp + CHECKSUM_HOME], 1
    jne     .LFsRtlCheckOplock_load
    compare rax, 5
    ja      .LFsRtlCheckOplock_default
    load_dword FsRtlCheckOplock, rcx, rdx, rax, .LFsRtlCheckOplock_table
    dispatch rcx, rdx
    case_bodies FsRtlCheckOplock, switch_id, 6
    default_body FsRtlCheckOplock, switch_id, 6
    dword_table FsRtlCheckOplock, 6, 6
    end_function
site_record FsRtlCheckOplock, FsRtlCheckOplock, FORM_ONE_LEVEL, 6, rdx, rax, rcx, GUARD_NONE, relocatable, FsRtlCheckOplock
call_record FsRtlCheckOplock, FORM_ONE_LEVEL, 6
model_record switch_id, 0, 0, 0, 6, 0, 1, 6, 1

    .section .rdata,"dr"
    .balign 4
InterruptLimit:
    .long   5
    resume_section

# --- outside .text ----------------------------------------------------------------------------------------------

code_section POOLCODE

switch ExAllocatePoolWithTag, entries=8, base=r8, dst=rcx

# --- hooks ------------------------------------------------------------------------------------------------------

# One function on each page that holds switch tables.
default_hook NtQuerySystemInformation
default_hook NtSetInformationFile
default_hook PoSetSystemState
default_hook SeAccessCheck
default_hook NtWriteFile
default_hook FsRtlCheckOplock
default_hook ExAllocatePoolWithTag

# What the kernel calls in the HAL: its import directory. The loader fills in the addresses.
.include "guest.inc"

.macro imports file, functions:vararg
    .section .rdata,"dr"
    .balign 8
    .globl  WlImportDirectory, WlImportDirectoryEnd
WlImportDirectory:
    .rva    .Llookups
    .long   0, 0
    .rva    .Lfile
    .rva    .Laddresses
    .fill   5, 4, 0
WlImportDirectoryEnd:
.Lfile:
    .asciz  "\file"
    .irp    name, \functions
    .balign 2
.LnameOf\name:
    .word   0                                   # hint
    .asciz  "\name"
    .endr
    .balign 8
.Llookups:
    .irp    name, \functions
    .rva    .LnameOf\name
    .long   0
    .endr
    .quad   0
.Laddresses:
    .irp    name, \functions
    .globl  __imp_\name
__imp_\name:
    .rva    .LnameOf\name
    .long   0
    .endr
    .quad   0
.endm

imports hal.dll, HalStartProcessors, HalStartClock, HalEndOfInterrupt, HalPutCharacter, HalDisplayString

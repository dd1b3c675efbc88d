# The platform layer for the embedded host, which is the HAL: all of the guest that knows what it runs on.
#
# Entry (made by src/guest/loader.ts): long mode with the System process's page table, interrupts off, on each
# processor RCX = boot block (guest.inc), RDX = index of the processor, RSP = end of its slot of the stack area.
# The images are mapped with the protection of their sections, 4 KB pages; the pool is zero.
#
# Every function here is called with interrupts off or with no lock held, uses no stack beyond its return
# address, and keeps every register except RAX. Each has a section of its own, without any padding: nearly all of its
# page is slack.
.include "guest.inc"

.set CONSOLE_PORT, 0xe9

.macro hal_function name, section
    .section \section,"xr0"
    export  \name
    .section \section,"xr0"
    .globl  \name
\name:
.endm

# Called by the first processor once the kernel is up: starts the others, which enter as it did. The host has started
# all of them at once.
hal_function HalStartProcessors, HALSTART
    ret

# Starts the periodic clock interrupt of this processor: the host raises CLOCK_VECTOR by itself.
hal_function HalStartClock, HALCLOCK
    ret

# Acknowledges the clock interrupt: the host expects nothing.
hal_function HalEndOfInterrupt, HALEOI
    ret

# Writes the character in AL to the console.
hal_function HalPutCharacter, HALPUTC
    out     CONSOLE_PORT, al
    ret

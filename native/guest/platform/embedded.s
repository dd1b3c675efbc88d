# The platform layer for the embedded host: all of the guest that knows what it runs on.
#
# Entry (made by src/guest/loader.ts): long mode with the System process's page table, interrupts off, on each
# processor RCX = boot block (guest.inc), RDX = index of the processor, RSP = end of its slot of the stack area.
# The image is mapped with the protection of its sections, 4 KB pages; the pool is zero.
#
# Every function here is called with interrupts off or with no lock held, uses no stack beyond its return
# address, and keeps every register except RAX.
.include "guest.inc"

.set CONSOLE_PORT, 0xe9

code_section .text$kernel

# Called by the first processor once the kernel is up: starts the others, which enter as it did. The host has started
# all of them at once.
function PlatformStartProcessors
    ret

# Starts the periodic clock interrupt of this processor: the host raises CLOCK_VECTOR by itself.
function PlatformStartClock
    ret

# Acknowledges the clock interrupt: the host expects nothing.
function PlatformEndOfInterrupt
    ret

# Writes the character in AL to the console.
function PlatformPutCharacter
    out     CONSOLE_PORT, al
    ret

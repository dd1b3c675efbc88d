# The platform layer for a Xen PVH domain: as platform/embedded.s, but that a function may use the stack. The start-up
# page (pvh-start.s) has brought every processor here with its local APIC in x2APIC mode.
.include "guest.inc"
.include "platform/pvh.inc"

# Xen writes what comes here to its log.
.set CONSOLE_PORT, 0xe9

.set X2APIC_EOI, 0x80b
.set X2APIC_SPURIOUS, 0x80f
.set X2APIC_COMMAND, 0x830
.set X2APIC_TIMER, 0x832
.set X2APIC_INITIAL_COUNT, 0x838
.set X2APIC_DIVIDE, 0x83e

.set SPURIOUS_VECTOR, 0xff
.set APIC_ENABLE, 0x100
.set TIMER_PERIODIC, 0x20000
.set DIVIDE_BY_1, 0xb
.set ALL_OTHERS_INIT, 0xc4500
.set ALL_OTHERS_START, 0xc4600
# 10 ms, about NT's own: an EPT violation that a tool answers may cost 2 ms. Xen's APIC timer counts at 100 MHz.
.set CLOCK_PERIOD, 1000000

# Changes RAX, RCX, RDX.
.macro write_apic register, value
    mov     ecx, \register
    mov     eax, \value
    xor     edx, edx
    wrmsr
.endm

# Starts the other processors: INIT, then a start-up IPI that names the start-up page. Xen needs no delay between them.
code_section HALSTART
export HalStartProcessors
frame_function HalStartProcessors, 0, rcx, rdx
    write_apic X2APIC_COMMAND, ALL_OTHERS_INIT
    write_apic X2APIC_COMMAND, ALL_OTHERS_START | START_PAGE
    leave_frame
    ret
end_frame_function

code_section HALCLOCK
export HalStartClock
frame_function HalStartClock, 0, rcx, rdx
    write_apic X2APIC_SPURIOUS, APIC_ENABLE | SPURIOUS_VECTOR
    write_apic X2APIC_DIVIDE, DIVIDE_BY_1
    write_apic X2APIC_TIMER, TIMER_PERIODIC | CLOCK_VECTOR
    write_apic X2APIC_INITIAL_COUNT, CLOCK_PERIOD
    leave_frame
    ret
end_frame_function

code_section HALEOI
export HalEndOfInterrupt
frame_function HalEndOfInterrupt, 0, rcx, rdx
    write_apic X2APIC_EOI, 0
    leave_frame
    ret
end_frame_function

code_section HALPUTC
export HalPutCharacter
function HalPutCharacter
    out     CONSOLE_PORT, al
    ret

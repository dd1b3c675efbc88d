# What the HAL has on every platform.
.include "guest.inc"

code_section .text

# What a kernel DLL is called at when it is loaded.
function DllInitialize
    xor     eax, eax
    ret

# RSI = zero-terminated text for the console.
export HalDisplayString
frame_function HalDisplayString, 0
    mov     al, [rsi]
    test    al, al
    jz      .Ldisplayed
    call    HalPutCharacter
    inc     rsi
    jmp     HalDisplayString
.Ldisplayed:
    ret
end_frame_function

debug_record "hal.pdb"

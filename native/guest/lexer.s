# Real code on this kernel: the lexer of tree-sitter's C grammar, as MSVC compiled it, out of the module. A thread
# reads the pieces of a text over and over; what it finds in each must be the same every time. The lexer is called as
# tree-sitter's parser calls it; only that a parser knows what mode to lex in, and here every mode has its turn.
.include "guest.inc"

# TSLexer of tree-sitter's parser.h, without the callbacks that this grammar does not use. What is ours lies behind it.
.set LEXER_LOOKAHEAD, 0x00
.set LEXER_SYMBOL, 0x04
.set LEXER_ADVANCE, 0x08
.set LEXER_MARK_END, 0x10
.set LEXER_EOF, 0x28
.set LEXER_BYTES, 0x38
.set LEXER_POSITION, LEXER_BYTES
.set LEXER_START, LEXER_BYTES + 0x04
.set LEXER_END, LEXER_BYTES + 0x08
.set LEXER_TEXT_BYTES, LEXER_BYTES + 0x0c
.set LEXER_TEXT, LEXER_BYTES + 0x10
.set LEXER_ALL_BYTES, LEXER_BYTES + 0x18

# TSLanguage, version 15 of its ABI.
.set LANGUAGE_STATES, 0x14
.set LANGUAGE_LEX_MODES, 0x88
.set LANGUAGE_LEX, 0x90
.set LANGUAGE_LEX_KEYWORD, 0x98
.set LANGUAGE_KEYWORD_SYMBOL, 0xa0
.set LEX_MODE_BYTES, 6
# The mode of error recovery: it takes any token.
.set ANY_TOKEN_MODE, 0
# A prime below the number of modes, so that each has its turn, and neighbours, which are alike, come far apart.
.set MODE_STEP, 997

.set NO_SYMBOL, 0xffff
.set SYMBOL_STEP, 0x9e3779b1

code_section .text$kernel

# RCX = boot block.
frame_function WlLexerThread, 0x28
    mov     rbx, rcx
    mov     ecx, 1
    call    KeDelayExecutionThread
    lea     rsi, [rip + WlReport]
.Lnext_pass:
    xor     edi, edi                            # the piece
    xor     ebp, ebp                            # checksum of the pass
.Lnext_piece:
    mov     ecx, edi
    call    WlLexPiece
    rol     ebp, 5
    xor     ebp, eax
    mov     rdx, [rbx + BOOT_CHECKSUMS]
    cmp     qword ptr [rsi + REPORT_LEXER_PASSES], 0
    jne     .Lcompare_piece
    mov     [rdx + rdi * 4], eax
.Lcompare_piece:
    cmp     [rdx + rdi * 4], eax
    je      .Lpiece_done
    inc     qword ptr [rsi + REPORT_LEXER_MISMATCHES]
.Lpiece_done:
    inc     qword ptr [rsi + REPORT_LEXER_PIECES]
    inc     edi
    cmp     edi, [rbx + BOOT_TEXT_PIECES]
    jb      .Lnext_piece
    cmp     qword ptr [rsi + REPORT_LEXER_PASSES], 0
    jne     .Lpass_done
    mov     [rsi + REPORT_LEXER_CHECKSUM], ebp
.Lpass_done:
    inc     qword ptr [rsi + REPORT_LEXER_PASSES]
    jmp     .Lnext_pass
end_frame_function

# RBX = boot block, ECX = number of a piece; EAX = checksum of its tokens.
frame_function WlLexPiece, LEXER_ALL_BYTES + 0x20, rbx, rbp, rsi, rdi, r12, r13, r14
    mov     r13d, ecx                           # the mode
    lea     rsi, [rsp + 0x20]
    mov     rdi, rsi
    xor     eax, eax
    mov     ecx, LEXER_ALL_BYTES
    rep stosb
    lea     rax, [rip + WlLexerAdvance]
    mov     [rsi + LEXER_ADVANCE], rax
    lea     rax, [rip + WlLexerMarkEnd]
    mov     [rsi + LEXER_MARK_END], rax
    lea     rax, [rip + WlLexerEof]
    mov     [rsi + LEXER_EOF], rax
    mov     eax, [rbx + BOOT_PIECE_BYTES]
    mov     [rsi + LEXER_TEXT_BYTES], eax
    imul    eax, r13d
    add     rax, [rbx + BOOT_TEXT]
    mov     [rsi + LEXER_TEXT], rax
    call    [rbx + BOOT_LANGUAGE]
    mov     rbx, rax
    xor     r12d, r12d                          # the checksum
    xor     r14d, r14d                          # where the next token begins
.Lnext_token:
    add     r13d, MODE_STEP
    mov     eax, [rbx + LANGUAGE_STATES]
.Lmode_too_large:
    cmp     r13d, eax
    jb      .Lmode_known
    sub     r13d, eax
    jmp     .Lmode_too_large
.Lmode_known:
    mov     eax, r13d
    call    WlLexInMode
    test    al, al
    jnz     .Ltoken_found
    mov     eax, ANY_TOKEN_MODE
    call    WlLexInMode
    mov     ebp, NO_SYMBOL
    lea     edi, [r14 + 1]
    test    al, al
    jz      .Ltoken_known
.Ltoken_found:
    movzx   ebp, word ptr [rsi + LEXER_SYMBOL]
    mov     edi, [rsi + LEXER_END]
    cmp     edi, r14d
    ja      .Ltoken_moves_on
    lea     edi, [r14 + 1]
.Ltoken_moves_on:
    cmp     bp, [rbx + LANGUAGE_KEYWORD_SYMBOL]
    jne     .Ltoken_known
    mov     edx, [rsi + LEXER_START]
    mov     r8, [rbx + LANGUAGE_LEX_KEYWORD]
    xor     r9d, r9d
    call    WlLexAt
    test    al, al
    jz      .Ltoken_known
    cmp     edi, [rsi + LEXER_END]
    jne     .Ltoken_known                       # an identifier that begins like a keyword
    movzx   ebp, word ptr [rsi + LEXER_SYMBOL]
.Ltoken_known:
    imul    eax, ebp, SYMBOL_STEP
    add     eax, edi
    rol     r12d, 5
    xor     r12d, eax
    inc     qword ptr [rip + WlReport + REPORT_LEXER_TOKENS]
    mov     r14d, edi
    cmp     r14d, [rsi + LEXER_TEXT_BYTES]
    jb      .Lnext_token
    mov     eax, r12d
    leave_frame
    ret
end_frame_function

# RSI = lexer, RBX = language, EAX = mode, R14D = where to begin; AL = whether there is a token.
function WlLexInMode
    imul    eax, eax, LEX_MODE_BYTES
    add     rax, [rbx + LANGUAGE_LEX_MODES]
    movzx   r9d, word ptr [rax]
    mov     edx, r14d
    mov     r8, [rbx + LANGUAGE_LEX]
    jmp     WlLexAt

# RSI = lexer, EDX = where to begin, R8 = which of the language's two lexers, R9D = its state; AL = whether there is
# a token.
frame_function WlLexAt, 0x28
    mov     rcx, rsi
    mov     [rcx + LEXER_POSITION], edx
    mov     [rcx + LEXER_START], edx
    call    WlLexerLook
    mov     edx, r9d
    call    r8
    leave_frame
    ret
end_frame_function

# RCX = lexer: shows it the character at its position, 0 at the end; changes RAX only.
function WlLexerLook
    mov     eax, [rcx + LEXER_POSITION]
    cmp     eax, [rcx + LEXER_TEXT_BYTES]
    jae     .Lat_end
    add     rax, [rcx + LEXER_TEXT]
    movzx   eax, byte ptr [rax]
    mov     [rcx + LEXER_LOOKAHEAD], eax
    ret
.Lat_end:
    mov     dword ptr [rcx + LEXER_LOOKAHEAD], 0
    ret

# --- the callbacks: RCX = lexer ---------------------------------------------------------------------------------

# DL = whether the character is none of the token's, and the token begins behind it.
function WlLexerAdvance
    inc     dword ptr [rcx + LEXER_POSITION]
    test    dl, dl
    jz      WlLexerLook
    mov     eax, [rcx + LEXER_POSITION]
    mov     [rcx + LEXER_START], eax
    jmp     WlLexerLook

function WlLexerMarkEnd
    mov     eax, [rcx + LEXER_POSITION]
    mov     [rcx + LEXER_END], eax
    ret

# Asked once before each switch.
function WlLexerEof
    inc     qword ptr [rip + WlReport + REPORT_LEXER_SWITCHES]
    mov     eax, [rcx + LEXER_POSITION]
    cmp     eax, [rcx + LEXER_TEXT_BYTES]
    setae   al
    ret

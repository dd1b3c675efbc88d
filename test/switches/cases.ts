// What most listings share.

/** The end of a one-level switch in `rcx`, from the load on. */
export const DISPATCH = `
load: mov ecx, [rdx+rax*4+table-image]
      add rcx, rdx
      jmp rcx`;

export interface Ending {
  readonly entries?: number;
  /** Text between the code and the tables. */
  readonly more?: string;
}

/**
 * Function `f`, whose index is a parameter of 32 bits in `eax`, with `code`, the labels `case` and `default`, a `table` of `entries` entries, and behind that more
 * dwords that look like entries, so that a rule which reads on would take them too.
 */
export function withTable(code: string, { entries = 5, more = '' }: Ending = {}): string {
  return `
f:    mov eax, eax
${code}
case: inc ebx
default: ret
${more}
      .balign 4, 0xcc
table: .rept ${entries}
      .long case-image
      .endr
other: .long default-image, default-image, default-image
end:`;
}

/** `cmp`, `ja`, and ImageBase in `rdx`. */
export const GUARDED = `
      cmp eax, 4
      ja default
      lea rdx, [rip+image]`;

import { describe, expect, it } from 'vitest';
import { MAX_TRAMPOLINE_SIZE, planDetour } from '../../src/hooks/detour.js';
import type { Gva } from '../../src/vmi/address.js';

const IMAGE = 0xffff_f800_1000_0000n;
const FUNCTION = IMAGE + 0x2000n;
const TRAMPOLINE = IMAGE + 0x8000n;
const GB2 = 2n ** 31n;

/** `mov eax, ecx; add eax, 5; ret`, behind whatever a test moves. */
const TAIL = '8bc1 83c005 c3';

function bytes(...code: string[]): Buffer {
  return Buffer.from(code.join('').replaceAll(' ', ''), 'hex');
}

function plan(code: string, trampoline: Gva = TRAMPOLINE, branchTargets: Gva[] = []) {
  return planDetour({ gva: FUNCTION, bytes: bytes(code), imageBase: IMAGE, branchTargets }, trampoline);
}

function planned(code: string, trampoline?: Gva, branchTargets?: Gva[]) {
  const result = plan(code, trampoline, branchTargets);
  if (result.refused !== undefined) throw new Error(`refused: ${result.refused}`);
  return result;
}

describe('encoding', () => {
  it('moves whole instructions and pads the entry with NOPs', () => {
    // push rbx (with the REX prefix that MSVC gives it); sub rsp, 32
    const { entry, trampoline, back } = planned(`4053 4883ec20 ${TAIL}`);
    expect(entry).toEqual({ gva: FUNCTION, bytes: bytes('e9 fb5f0000 90') });
    expect(trampoline).toEqual({ gva: TRAMPOLINE, bytes: bytes('4053 4883ec20 e9 fb9fffff') });
    expect(back).toBe(FUNCTION + 6n);
  });

  it('stops at five bytes', () => {
    const { entry, back } = planned(`48895c2408 ${TAIL}`);
    expect(entry.bytes.length).toBe(5);
    expect(back).toBe(FUNCTION + 5n);
  });

  it('keeps a RIP-relative operand on its target, an immediate behind it included', () => {
    // cmp dword ptr [rip+0x1000], 0x12345678
    const { trampoline } = planned(`813d 00100000 78563412 ${TAIL}`);
    const moved = trampoline.bytes.subarray(0, 10);
    const target = FUNCTION + 10n + 0x1000n;
    expect(moved.readInt32LE(2)).toBe(Number(target - (TRAMPOLINE + 10n)));
    expect(moved.toString('hex', 6)).toBe('78563412');
  });

  it('reaches its largest size with a long instruction behind four short bytes', () => {
    // lock add qword ptr gs:[rax+rcx*4+256], imm32, with a prefix twice: 15 bytes
    const { trampoline } = planned(`90909090 f06565 48818488 00010000 78563412 ${TAIL}`);
    expect(trampoline.bytes.length).toBe(MAX_TRAMPOLINE_SIZE);
  });
});

describe('refusal', () => {
  it.each([
    ['too-short', 'a function of four bytes', '33c0 90 c3'],
    ['undecodable', 'an invalid instruction among those to move', '06 9090909090 c3'],
    ['undecodable', 'an invalid instruction further on', '4053 4883ec20 8bc1 06 c3'],
    ['undecodable', 'an instruction cut off by the end', '4053 4883ec20 8bc1 e800'],
    ['call', 'a call', '4883ec28 e800010000 4883c428 c3'],
    ['call', 'an indirect call', '33c0 ff1500010000 c3'],
    ['call', 'a system call', '8bc1 8bd1 0f05 c3'],
    ['branch', 'a jump', 'eb10 9090909090 c3'],
    ['branch', 'a conditional jump at the last moved byte', '83f905 7705 8bc1 c3'],
    ['branch', 'an indirect jump', 'ff2500010000 c3'],
    ['too-short', 'a return with padding behind it', '33c0 c3 cccccc'],
    ['branch', 'a return that a jump covers the end of', '33c0 8bc0 c3 cccccc'],
    ['branch', 'a breakpoint', '33c0 cc 33c0 c3'],
    ['branch', 'an undefined instruction', '33c0 0f0b 33c0 c3'],
    ['branch', 'the start of a transaction', 'c7f800000000 c3'],
    ['branch-target', 'a loop back into the moved bytes', '33c0 ffc0 ffc8 75fa c3'],
    ['branch-target', 'a loop to the last moved instruction', '33c0 ffc0 ffc8 e2fc c3'],
    ['branch-target', 'a later call into the moved bytes', '33c0 ffc0 ffc8 e8f9ffffff c3'],
    ['branch-target', 'the address of a moved instruction, taken by lea', '33c0 ffc0 ffc8 488d0df5ffffff c3'],
    ['eip-relative-operand', 'an operand relative to EIP', '67 8b05 00100000 c3'],
    ['interrupt-shadow', 'sti as the last moved instruction', '33c0 33c9 fb f4 c3'],
    ['interrupt-shadow', 'a load of ss as the last moved instruction', '33c0 90 8ed1 8be2 c3'],
    ['fault-off-frame', 'a read through a register after a push', '53 8b4110 48890b 5b c3'],
    ['fault-off-frame', 'a write through an index after a sub', '4883ec20 4289048d00000000 4883c420 c3'],
    ['fault-off-frame', 'a string store after a push', '57 b105 f3aa 5f c3'],
  ])('%s: %s', (reason, _name, code) => {
    expect(plan(code).refused).toBe(reason);
  });

  it('branch-target: a case label that the caller knows', () => {
    const code = `4053 4883ec20 ${TAIL}`;
    expect(plan(code, TRAMPOLINE, [FUNCTION + 2n]).refused).toBe('branch-target');
    expect(plan(code, TRAMPOLINE, [FUNCTION + 5n]).refused).toBe('branch-target');
    expect(plan(code, TRAMPOLINE, [FUNCTION, FUNCTION + 6n]).refused).toBeUndefined();
  });

  describe('a switch table behind the code', () => {
    // push rbx; sub rsp, 32; lea rdx, [rip + ImageBase]; mov ecx, [rdx+rcx*4+0x201a]; add rcx, rdx; jmp rcx; nop
    const dispatch = '4053 4883ec20 488d15f3dfffff 8b8c8a1a200000 4803ca ffe1 90';
    const table = (...entries: string[]) => plan(dispatch + entries.join(''));

    it('is not taken for code', () => {
      expect(table('06200000', '19200000', '0606').refused).toBeUndefined();
    });

    it('leads to places like any branch does: branch-target', () => {
      expect(table('06200000', '02200000').refused).toBe('branch-target');
    });

    it('is none when its first entry leads elsewhere: undecodable', () => {
      expect(table('06300000', '06060606').refused).toBe('undecodable');
    });

    it('is none when it is no load of four bytes by an index of four: undecodable', () => {
      const dense = dispatch.replace('8b8c8a', '8b8c4a');
      expect(plan(`${dense} 06200000 06060606`).refused).toBe('undecodable');
    });

    it('does not end the code when it lies before the load', () => {
      // mov eax, 0x2000; mov ecx, [rdx+rcx*4+0x2001]
      const code = 'b800200000 8b8c8a01200000 06 c3';
      expect(plan(code).refused).toBe('undecodable');
    });
  });

  it.each([
    ['a loop to the first instruction', '33c0 ffc0 ffc8 75f8 c3'],
    ['a loop to the first instruction behind the moved ones', '33c0 ffc0 ffc8 90 75fd c3'],
    ['sti that is followed by a moved instruction', '33c0 fb 33c9 90 c3'],
    ['an access through a register before a push', '8b4110 4053 5b c3'],
    ['an access through a register by the push itself', 'ff31 8bc1 90 58 c3'],
    ['an access to the stack after a push', '53 48894c2410 5b c3'],
    ['an access to static data after a push', '53 8b0500100000 5b c3'],
    ['an access to the processor block after a sub', '4883ec28 65488b042588010000 4883c428 c3'],
    ['an address computed, not accessed, after a push', '53 488d4110 90 5b c3'],
    ['its own first bytes read as data', '33c0 ffc0 ffc8 8b05f5ffffff c3'],
    ['a function that begins with a computed address of its own start', '488d05f9ffffff c3'],
  ])('none: %s', (_name, code) => {
    expect(plan(code).refused).toBeUndefined();
  });

  it('jump-out-of-range, to the byte', () => {
    const code = `4053 4883ec20 ${TAIL}`;
    const back = FUNCTION + 6n;
    const furthest = back + GB2 - 11n;
    expect(plan(code, furthest).refused).toBeUndefined();
    expect(plan(code, furthest + 1n).refused).toBe('jump-out-of-range');
    const nearest = FUNCTION + 5n - GB2;
    expect(plan(code, nearest).refused).toBeUndefined();
    expect(plan(code, nearest - 1n).refused).toBe('jump-out-of-range');
  });

  it('operand-out-of-range, to the byte', () => {
    // mov rax, [rip + 0x70000000]
    const code = `488b05 00000070 ${TAIL}`;
    const lowest = FUNCTION + 0x7000_0000n - (GB2 - 1n);
    expect(plan(code, lowest).refused).toBeUndefined();
    expect(plan(code, lowest - 1n).refused).toBe('operand-out-of-range');
  });
});

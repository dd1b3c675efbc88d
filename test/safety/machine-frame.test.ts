import { describe, expect, it } from 'vitest';
import { readMachineFrame } from '../../src/safety/machine-frame.js';
import { GuestMemory } from '../../src/vmi/guest-memory.js';

const WHERE = 0xffff_8000_0000_1000n;

interface Frame {
  rip?: bigint;
  cs?: bigint;
  rflags?: bigint;
  rsp?: bigint;
  ss?: bigint;
}

/** A stack that begins with a frame of interrupted kernel code, changed as given. */
function judge(changed: Frame, length = 40): boolean {
  const frame = {
    rip: 0xffff_f800_1234_5678n,
    cs: 0x10n,
    rflags: 0x246n,
    rsp: 0xffff_f500_0000_8000n,
    ss: 0x18n,
    ...changed,
  };
  const stack = Buffer.alloc(40);
  [frame.rip, frame.cs, frame.rflags, frame.rsp, frame.ss].forEach((value, index) => {
    stack.writeBigUInt64LE(value, index * 8);
  });
  const memory = new GuestMemory(
    {
      translate: (_, gva) => (gva < WHERE + BigInt(length) ? gva - WHERE : undefined),
      readPhysical: (gpa, size) => stack.subarray(Number(gpa), Number(gpa) + size),
    },
    0n,
  );
  return readMachineFrame(memory, WHERE) !== undefined;
}

describe('a machine frame of kernel code', () => {
  it.each([
    ['as the processor pushes it', {}],
    ['with garbage above its selectors', { cs: 0xdead_0000_0010n, ss: 0xffff_0018n }],
    ['with every flag', { rflags: 0x3f7fd7n }],
    ['without a stack segment, as long mode allows', { ss: 0n }],
    ['with interrupts off', { rflags: 0x46n }],
  ] as const)('is one: %s', (_, changed) => expect(judge(changed)).toBe(true));

  it.each([
    ['user code', { cs: 0x33n }],
    ['a return address in front of locals', { cs: 0n, rflags: 0n }],
    ['flags without the bit that is always set', { rflags: 0x244n }],
    ['flags that do not exist', { rflags: 0x8_0000_0246n }],
    ['a stack in user memory', { rsp: 0x7ff6_0000_1000n }],
    ['a null stack', { rsp: 0n }],
  ] as const)('is none: %s', (_, changed) => expect(judge(changed)).toBe(false));
});

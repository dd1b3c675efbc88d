// One instruction at a time, without the guest noticing: neither in its flags nor in what it pushes or loads.
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { ACCESS_EXECUTE, type Machine } from '../../src/machine/machine.js';
import { type Gva, pageOffset } from '../../src/vmi/address.js';
import type { Registers } from '../../src/x86/registers.js';
import {
  CODE,
  createFlatMachine,
  DATA,
  handlerOf,
  hexBytes,
  KERNEL_BASE,
  SCRATCH,
  setAccess,
  setGate,
} from './support.js';

const USER_CODE = 0x11000n;
const SYSTEM_CALL = 0x12000n;
const SYSTEM_CALL_GATE = 0x80;
const TRAP_FLAG = 0x100n;

let machine: Machine;
beforeEach(() => {
  machine = createFlatMachine();
});
afterEach(() => machine.close());

interface Program {
  readonly code: string;
  /** With the HLT at the end. */
  readonly instructions: number;
  readonly also?: Readonly<Record<string, string>>;
}

const PROGRAMS: Record<string, Program> = {
  // pushfq; pop rax; or rax, 0x8d5; push rax; popfq; pushfq; pop rbx; hlt
  'flags pushed, changed and popped': { code: '9c58480dd5080000509d9c5b f4', instructions: 8 },
  // mov rax, rsp; push 0x18; push rax; push 0x246; push 0x10; lea rax, [rip+3]; push rax; iretq; inc ebx; hlt
  'a return from an interrupt': {
    code: '4889e06a185068460200006a10488d05030000005048cf ffc3 f4',
    instructions: 10,
  },
  // mov ax, ss; sti; mov ss, ax; mov rbx, rsp; nop; hlt. Nothing stops a CPU between MOV SS and what follows it.
  'instructions that shadow interrupts': { code: '668cd0 fb 8ed0 4889e3 90 f4', instructions: 5 },
  // nop; pause; jmp; mov ecx, 3; rep stosb; repe cmpsb; loop; hlt
  'repeated and hinted instructions': {
    code: '90 f390 eb00 b903000000 f3aa f3a6 e200 f4',
    instructions: 10,
  },
  // int3; int 0x80 (each to a handler that returns); ud2 (to one that halts)
  'interrupts raised by the program': {
    code: 'cc cd81 0f0b',
    instructions: 5,
    also: { [handlerOffset(3)]: '48cf', [handlerOffset(0x81)]: '48cf' },
  },
  // STAR, LSTAR and FMASK set; iretq to user code: mov eax, 7; syscall; mov rbx, rax; mov r13, rcx; mov r14, r11;
  // int 0x80. The system call: inc rax; pushfq; pop rdx; sysretq
  'user mode, SYSCALL and SYSRET': {
    code: `b9810000c031c0ba100023000f30 ffc1b800200100ba00f8ffff0f30 83c102b80007000031d20f30
      6a2b680010030068020200006a33680010010048cf`,
    instructions: 29,
    also: {
      [USER_CODE.toString()]: 'b8070000000f054889c34989cd4d89decd80',
      [SYSTEM_CALL.toString()]: '48ffc09c5a480f07',
    },
  },
  // xor eax, eax; cpuid; mov cr8 and back; rdmsr; swapgs twice; hlt
  'instructions that are intercepted': {
    code: '31c00fa2 b805000000440f22c0440f20c3 b9010100c00f32 0f01f80f01f8 f4',
    instructions: 10,
  },
};

/** In place of the handler that only halts. */
function handlerOffset(vector: number): string {
  return (0x13000 + vector * 0x10).toString();
}

const WAYS: Record<string, () => number> = {
  'instruction by instruction': () => {
    let retired = 0;
    for (let step = machine.step(0, 1); step.retired > 0; step = machine.step(0, 1)) {
      retired++;
      expect(machine.registers(0).rflags & TRAP_FLAG).toBe(0n);
    }
    return retired;
  },
  'all at once': () => machine.step(0, 1000).retired,
  'by single-step traps, free running': () => {
    machine.setSingleStep(0, true);
    let traps = 0;
    for (let run = machine.run(10_000); !run.idle; run = machine.run(10_000)) {
      for (const trap of run.traps) {
        traps++;
        const { rip, rflags } = machine.registers(0);
        expect(trap).toMatchObject({ kind: 'single-step', vcpu: 0, rip });
        expect(rflags & TRAP_FLAG).toBe(0n);
        machine.complete(0);
      }
    }
    machine.setSingleStep(0, false);
    return traps;
  },
};

function prepare({ code, also = {} }: Program): void {
  for (const vector of [3, 0x81]) {
    if (handlerOffset(vector) in also) setGate(machine, vector, KERNEL_BASE + BigInt(handlerOffset(vector)));
  }
  setGate(machine, SYSTEM_CALL_GATE, handlerOf(machine, SYSTEM_CALL_GATE), { privilege: 3 });
  machine.writePhysical(CODE, hexBytes(code));
  machine.writePhysical(SCRATCH, Buffer.alloc(0x1000));
  for (const [gpa, bytes] of Object.entries(also)) machine.writePhysical(BigInt(gpa), hexBytes(bytes));
  machine.setRegisters(0, { rip: CODE, rsi: SCRATCH, rdi: SCRATCH + 0x100n });
}

function outcome(): { registers: Registers; scratch: string; stack: string } {
  const registers = machine.registers(0);
  const stack = registers.rsp >= KERNEL_BASE ? registers.rsp - KERNEL_BASE : registers.rsp;
  return {
    registers,
    scratch: machine.readPhysical(SCRATCH, 0x1000).toString('hex'),
    // What has been pushed and popped lies below.
    stack: machine.readPhysical(stack - 0x80n, 0x100).toString('hex'),
  };
}

describe.each(Object.entries(PROGRAMS))('%s', (_, program) => {
  it.each(Object.keys(WAYS))(
    '%s: as many instructions as there are, with the effects of a free run',
    (way) => {
      prepare(program);
      while (!machine.run(10_000).idle);
      const expected = outcome();
      machine.close();
      machine = createFlatMachine();
      prepare(program);
      expect(WAYS[way]!()).toBe(program.instructions);
      expect(outcome()).toEqual(expected);
    },
  );
});

describe('a single-step trap', () => {
  it('follows a violation once the instruction has been completed, at the next instruction', () => {
    setAccess(machine, DATA, 1, ACCESS_EXECUTE);
    machine.writePhysical(CODE, hexBytes('488b03 90 f4'));
    machine.setRegisters(0, { rip: CODE, rbx: DATA });
    machine.setSingleStep(0, true);
    const [violation] = machine.run(10_000).traps;
    expect(violation).toMatchObject({ kind: 'violation', rip: CODE });
    machine.complete(0);
    const [step] = machine.run(10_000).traps;
    expect(step).toMatchObject({ kind: 'single-step', rip: CODE + 3n });
    expect(step!.instruction).toEqual(hexBytes('90'));
    machine.complete(0);
    expect(machine.run(10_000).traps).toMatchObject([{ kind: 'single-step', rip: CODE + 4n }]);
  });

  it('comes once for each element of a repeated instruction', () => {
    machine.writePhysical(CODE, hexBytes('f3aa f4'));
    machine.setRegisters(0, { rip: CODE, rdi: SCRATCH, rcx: 3n });
    machine.setSingleStep(0, true);
    const seen: [Gva, bigint][] = [];
    for (let turn = 0; turn < 3; turn++) {
      const { trap } = machine.step(0, 1);
      const { rip, rcx } = machine.registers(0);
      seen.push([rip, rcx]);
      expect(trap).toMatchObject({ kind: 'single-step', rip });
      machine.complete(0);
    }
    expect(seen).toEqual([
      [CODE, 2n],
      [CODE, 1n],
      [CODE + 2n, 0n],
    ]);
  });

  it('comes at the handler’s first instruction when an interrupt is taken, and after that', () => {
    machine.writePhysical(CODE, hexBytes('90 90 f4'));
    machine.setRegisters(0, { rip: CODE, rflags: 0x202n });
    setGate(machine, 0x40, KERNEL_BASE + SCRATCH);
    // nop; iretq
    machine.writePhysical(SCRATCH, hexBytes('90 48cf'));
    machine.setSingleStep(0, true);
    machine.raiseInterrupt(0, 0x40);
    const rips = [];
    for (let turn = 0; turn < 4; turn++) {
      rips.push(machine.run(10_000).traps[0]!.rip);
      machine.complete(0);
    }
    expect(rips).toEqual([KERNEL_BASE + SCRATCH + 1n, CODE, CODE + 1n, CODE + 2n]);
  });

  it('no longer comes when it was switched off at one', () => {
    machine.writePhysical(CODE, hexBytes('90 90 90 f4'));
    machine.setRegisters(0, { rip: CODE });
    machine.setSingleStep(0, true);
    expect(machine.run(10_000).traps).toHaveLength(1);
    machine.setSingleStep(0, false);
    machine.complete(0);
    expect(machine.run(10_000)).toEqual({ traps: [], idle: true });
    expect(machine.registers(0).rip).toBe(CODE + 4n);
  });
});

describe('the guest’s own RFLAGS.TF', () => {
  // mov rax, [rbx]; nop; hlt
  const CODE_BYTES = '488b03 90 f4';
  const DEBUG = 1;

  /** What #DB pushes: where, and with TF set. */
  function debugFrame(): { handler: boolean; rip: Gva; trapFlag: boolean } {
    const { rip, rsp } = machine.registers(0);
    const frame = machine.readPhysical(rsp - KERNEL_BASE, 24);
    return {
      handler: rip - BigInt(pageOffset(rip) & 0xf) === handlerOf(machine, DEBUG),
      rip: frame.readBigUInt64LE(0),
      trapFlag: (frame.readBigUInt64LE(16) & TRAP_FLAG) !== 0n,
    };
  }

  beforeEach(() => {
    machine.writePhysical(CODE, hexBytes(CODE_BYTES));
    machine.setRegisters(0, { rip: CODE, rbx: DATA, rflags: 0x102n });
  });
  const EXPECTED = { handler: true, rip: CODE + 3n, trapFlag: true };

  it('raises #DB behind the instruction, free running', () => {
    machine.run(10_000);
    expect(debugFrame()).toEqual(EXPECTED);
  });

  it('and stepped', () => {
    expect(machine.step(0, 1).retired).toBe(1);
    expect(debugFrame()).toEqual(EXPECTED);
  });

  it('and when the instruction had trapped and is completed', () => {
    setAccess(machine, DATA, 1, ACCESS_EXECUTE);
    expect(machine.step(0, 1).trap).toMatchObject({ rip: CODE });
    expect(machine.registers(0).rflags & TRAP_FLAG).toBe(TRAP_FLAG);
    machine.complete(0);
    expect(debugFrame()).toEqual(EXPECTED);
  });

  it('is what PUSHFQ stores', () => {
    for (const stepped of [false, true]) {
      // pushfq; hlt
      machine.writePhysical(CODE, hexBytes('9c f4'));
      machine.setRegisters(0, { rip: CODE, rflags: 0x102n });
      if (stepped) machine.step(0, 1);
      else machine.run(10_000);
      const frame = machine.readPhysical(machine.registers(0).rsp - KERNEL_BASE, 40);
      const interrupted = frame.readBigUInt64LE(24);
      const pushed = machine.readPhysical(interrupted - KERNEL_BASE, 8).readBigUInt64LE();
      expect(pushed & TRAP_FLAG).toBe(TRAP_FLAG);
    }
  });
});

it('INT 1 is an interrupt like any other', () => {
  for (const stepped of [false, true]) {
    machine.writePhysical(CODE, hexBytes('cd01 f4'));
    machine.setRegisters(0, { rip: CODE });
    if (stepped) machine.step(0, 2);
    else machine.run(10_000);
    const { rip, rsp } = machine.registers(0);
    expect(rip).toBe(handlerOf(machine, 1) + 1n);
    expect(machine.readPhysical(rsp - KERNEL_BASE, 8).readBigUInt64LE()).toBe(CODE + 2n);
  }
});

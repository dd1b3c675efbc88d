// How events are answered on Xen, on instructions that the embedded machine executes.
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { openSessionOn } from '../../src/libvmi/open-session.js';
import type { LibvmiSession } from '../../src/libvmi/session.js';
import {
  ACCESS_EXECUTE,
  ACCESS_READ,
  ACCESS_WRITE,
  type Machine,
  type Trap,
} from '../../src/machine/machine.js';
import { type Gpa, gfnOf, PAGE_SIZE } from '../../src/vmi/address.js';
import type { HiddenPiece } from '../../src/vmi/hypervisor.js';
import type { Registers } from '../../src/x86/registers.js';
import { CODE, createFlatMachine, DATA, hexBytes, SCRATCH } from '../machine/support.js';
import { XenLibrary } from '../support/xen-library.js';

const NEXT_PAGE = DATA + BigInt(PAGE_SIZE);
const ZERO_FLAG = 0x40n;
const HLT = 'f4';
/** `VMI_MEMACCESS_X` */
const ABI_EXECUTE = 8;

let machine: Machine;
let library: XenLibrary;
let session: LibvmiSession;
let pieces: HiddenPiece[];
/** What the tests' instructions read, where they read once. */
let onlyRead: number | undefined;
/** Where a handler was asked. */
let asked: Gpa[];
let written: (readonly HiddenPiece[])[];

beforeEach(() => {
  machine = createFlatMachine({ vcpus: 2 });
  attach(new XenLibrary(machine));
});
afterEach(() => {
  session.close();
  machine.close();
});

function attach(xen: XenLibrary): void {
  library = xen;
  // One instruction of vCPU 0 at a time.
  library.advance = () => step(0);
  session = openSessionOn(library, { name: 'guest' });
  pieces = [];
  onlyRead = undefined;
  asked = [];
  written = [];
  session.onViolation(
    ({ gpa }) => {
      asked.push(gpa);
      return pieces.find((piece) => piece.gpa >= gpa && gfnOf(piece.gpa) === gfnOf(gpa))?.original;
    },
    {
      onlyRead: () => onlyRead,
      piecesOn: (gfn) => pieces.filter((piece) => gfnOf(piece.gpa) === gfn),
      written: (hit) => written.push(hit),
    },
  );
}

function step(vcpu: number) {
  const { trap } = machine.step(vcpu, 1);
  return trap === undefined ? [] : [trap];
}

/** Has `current` in memory where a reader is to see `original`. */
function hide(gpa: Gpa, original: string, current: string): HiddenPiece {
  const piece = { gpa, original: hexBytes(original), current: hexBytes(current) };
  pieces.push(piece);
  machine.writePhysical(gpa, piece.current);
  session.trapAccess(gfnOf(gpa));
  return piece;
}

/** Gets a vCPU ready to run `code` and to halt behind it. */
function load(code: string, registers: Partial<Registers>, { vcpu = 0, at = CODE } = {}): void {
  machine.writePhysical(at, hexBytes(code + HLT));
  machine.setRegisters(vcpu, { rip: at, ...registers });
}

/** Listens until vCPU 0 stands on the HLT behind so many bytes of code, and is not in a step. */
function runTo(rip: Gpa): Registers {
  for (let listens = 0; machine.registers(0).rip !== rip || library.stepping; listens++) {
    if (listens > 1000) throw new Error('the code did not get there');
    session.listen(1);
  }
  return machine.registers(0);
}

/** Listens until an instruction is being stepped. */
function untilStep(): void {
  for (let listens = 0; !library.stepping; listens++) {
    if (listens > 100) throw new Error('nothing was stepped');
    session.listen(0);
    if (!library.stepping) session.listen(1);
  }
}

function expectHidden(): void {
  for (const { gpa, current } of pieces) {
    expect([...machine.readPhysical(gpa, current.length)]).toEqual([...current]);
    expect(machine.access(gfnOf(gpa))).toBe(ACCESS_EXECUTE);
  }
  expect(library.stepping).toBe(false);
}

describe('an instruction that reads once', () => {
  test('is answered with data, and no step', () => {
    onlyRead = 4;
    hide(DATA + 8n, '11223344', 'aabbccdd');
    load('8b06', { rsi: DATA + 8n, rax: 0n }); // mov eax, [rsi]
    expect(runTo(CODE + 2n).rax).toBe(0x4433_2211n);
    expect(library.answers).toEqual({ again: 0, emulated: 0, withData: 1, steps: 0 });
    expectHidden();
  });

  test('where nothing is hidden is emulated: answered with nothing it would fault for ever', () => {
    onlyRead = 4;
    hide(DATA + 8n, '11223344', 'aabbccdd');
    machine.writePhysical(DATA + 64n, hexBytes('55667788'));
    load('8b06', { rsi: DATA + 64n, rax: 0n });
    expect(runTo(CODE + 2n).rax).toBe(0x8877_6655n);
    expect(library.answers).toEqual({ again: 0, emulated: 1, withData: 0, steps: 0 });
  });
});

describe('a write to a trapped frame', () => {
  test('is carried out', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    load('8907', { rdi: DATA + 64n, rax: 0x1234_5678n }); // mov [rdi], eax
    runTo(CODE + 2n);
    expect([...machine.readPhysical(DATA + 64n, 4)]).toEqual([...hexBytes('78563412')]);
  });
});

describe('an instruction that cannot be answered with data sees the original bytes', () => {
  test('a comparison of two hidden places, on one frame', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    hide(DATA + 64n, '11223344', '01020304');
    load('a7', { rsi: DATA + 8n, rdi: DATA + 64n, rflags: 2n }); // cmpsd
    expect(runTo(CODE + 1n).rflags & ZERO_FLAG).toBe(ZERO_FLAG);
    expect(library.answers.steps).toBe(1);
    expectHidden();
  });

  test('a comparison of two hidden places on two frames, in one step', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    hide(NEXT_PAGE + 64n, '11223344', '01020304');
    load('a7', { rsi: DATA + 8n, rdi: NEXT_PAGE + 64n, rflags: 2n });
    expect(runTo(CODE + 1n).rflags & ZERO_FLAG).toBe(ZERO_FLAG);
    expect(library.answers.steps).toBe(1);
    expectHidden();
  });

  test.each<[string, Gpa[]]>([
    ['the first page', [NEXT_PAGE - 4n]],
    ['the second page', [NEXT_PAGE]],
    ['both pages', [NEXT_PAGE - 4n, NEXT_PAGE]],
  ])('a read across pages, hidden on %s', (_name, places) => {
    machine.writePhysical(NEXT_PAGE - 4n, hexBytes('0102030405060708'));
    for (const gpa of places) hide(gpa, gpa === NEXT_PAGE ? '05060708' : '01020304', 'cccccccc');
    load('488b06', { rsi: NEXT_PAGE - 4n, rax: 0n }); // mov rax, [rsi]
    expect(runTo(CODE + 3n).rax).toBe(0x0807_0605_0403_0201n);
    expectHidden();
  });

  test('a copy of many elements, one step for each', () => {
    hide(DATA + 8n, '1122334455', 'aabbccddee');
    load('f3a4', { rsi: DATA + 8n, rdi: SCRATCH, rcx: 5n }); // rep movsb
    runTo(CODE + 2n);
    expect([...machine.readPhysical(SCRATCH, 5)]).toEqual([...hexBytes('1122334455')]);
    expect(library.answers.steps).toBe(5);
    expectHidden();
  });

  test('an instruction on the frame that it reads', () => {
    hide(DATA + 0x808n, '11223344', 'aabbccdd');
    hide(DATA + 0x840n, '11223344', '01020304');
    load('a7', { rsi: DATA + 0x808n, rdi: DATA + 0x840n, rflags: 2n }, { at: DATA });
    expect(runTo(DATA + 1n).rflags & ZERO_FLAG).toBe(ZERO_FLAG);
    expectHidden();
  });

  test('an instruction that is hidden itself stays what it is', () => {
    hide(DATA, '9090', 'a7f4'); // cmpsd; hlt in place of two nops
    hide(DATA + 0x808n, '11223344', 'aabbccdd');
    hide(DATA + 0x840n, '11223344', '01020304');
    machine.setRegisters(0, { rip: DATA, rsi: DATA + 0x808n, rdi: DATA + 0x840n, rflags: 2n });
    expect(runTo(DATA + 1n).rflags & ZERO_FLAG).toBe(ZERO_FLAG);
    expectHidden();
  });
});

describe('while hidden bytes are shown', () => {
  test('what the guest writes there stays, and is told; the rest is hidden again', () => {
    const piece = hide(DATA + 8n, '11223344', 'aabbccdd');
    load('f3a4', { rsi: DATA + 8n, rdi: DATA + 10n, rcx: 1n }); // rep movsb: 11 over 33
    runTo(CODE + 2n);
    expect([...machine.readPhysical(DATA + 8n, 4)]).toEqual([...hexBytes('aabb11dd')]);
    expect(written).toEqual([[piece]]);
  });

  test('what the guest writes beside them is told, too: it may be code', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    load('f3a4', { rsi: DATA + 8n, rdi: DATA + 64n, rcx: 1n });
    runTo(CODE + 2n);
    expect(written).toEqual([[]]);
    expectHidden();
  });

  test('another vCPU does not execute them: it goes on once they are hidden again', () => {
    // inc ebx; hlt in place of two halts
    hide(DATA, 'f4f4f4', 'ffc3f4');
    hide(DATA + 0x808n, '11223344', 'aabbccdd');
    load('a7', { rsi: DATA + 0x808n, rdi: DATA + 0x808n, rflags: 2n });
    machine.setRegisters(1, { rip: DATA, rbx: 5n });
    untilStep();
    const again = library.answers.again;
    library.advance = () => step(1);
    for (let listens = 0; listens < 3; listens++) session.listen(1);
    expect(library.answers.again).toBeGreaterThan(again);
    expect(machine.registers(1)).toMatchObject({ rip: DATA, rbx: 5n });
    library.advance = () => step(0);
    runTo(CODE + 1n);
    library.advance = () => step(1);
    session.listen(1);
    expect(machine.registers(1).rbx).toBe(6n);
    expectHidden();
  });

  test('another vCPU that has to be shown bytes waits for its turn, and is counted once', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    hide(NEXT_PAGE + 8n, '11223344', '01020304');
    load('a7', { rsi: DATA + 8n, rdi: DATA + 8n, rflags: 2n });
    load('a7', { rsi: NEXT_PAGE + 8n, rdi: NEXT_PAGE + 8n, rflags: 2n }, { vcpu: 1, at: CODE + 0x100n });
    untilStep();
    asked = [];
    library.advance = () => step(1);
    for (let listens = 0; listens < 10; listens++) session.listen(1);
    expect(machine.registers(1).rip).toBe(CODE + 0x100n);
    expect(asked).toEqual([]);
    library.advance = () => [...step(0), ...step(1)];
    for (let listens = 0; machine.registers(1).rip === CODE + 0x100n || library.stepping; listens++) {
      expect(listens).toBeLessThan(1000);
      session.listen(1);
    }
    expect(machine.registers(1).rip).toBe(CODE + 0x101n);
    expectHidden();
  });

  test('a pause does not wait for what other vCPUs want to be shown', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    hide(NEXT_PAGE + 8n, '11223344', 'aabbccdd');
    const copy = (vcpu: number, from: Gpa) => {
      const registers = { rsi: from, rdi: SCRATCH + BigInt(vcpu) * 0x400n, rcx: 1000n, rflags: 2n };
      load('f3a4', registers, { vcpu, at: CODE + BigInt(vcpu) * 0x100n }); // rep movsb
    };
    copy(0, DATA + 8n);
    copy(1, NEXT_PAGE + 8n);
    // The end of one vCPU's step is told just before the next violation of the other.
    const stepsFirst = (trap: Trap) => (trap.kind === 'single-step' ? 0 : 1);
    library.advance = () => [...step(0), ...step(1)].sort((a, b) => stepsFirst(a) - stepsFirst(b));
    untilStep();
    const before = library.answers.steps;
    session.pause();
    expect(library.answers.steps - before).toBeLessThan(3);
    expectHidden();
    session.resume();
    library.advance = () => [];
  });

  test('a pause waits until they are hidden again', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    load('a7', { rsi: DATA + 8n, rdi: DATA + 8n, rflags: 2n });
    untilStep();
    session.pause();
    expectHidden();
    session.resume();
  });

  test('a vCPU that never finishes its instruction is an error, and a close hides nothing less', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    load('a7', { rsi: DATA + 8n, rdi: DATA + 8n, rflags: 2n });
    untilStep();
    library.advance = () => [];
    let now = 0;
    const clock = vi.spyOn(performance, 'now').mockImplementation(() => {
      now += 4000;
      return now;
    });
    expect(() => session.pause()).toThrow(expect.objectContaining({ code: 'HYPERVISOR_STUCK' }));
    expect(() => session.close()).toThrow(expect.objectContaining({ code: 'HYPERVISOR_STUCK' }));
    clock.mockRestore();
    expect([...machine.readPhysical(DATA + 8n, 4)]).toEqual([...hexBytes('aabbccdd')]);
    expect(machine.access(gfnOf(DATA))).not.toBe(ACCESS_EXECUTE);
  });
});

describe('what a vCPU was told to emulate, and has yet to', () => {
  test('is waited for by a pause: what is written then would be decoded in its place', () => {
    onlyRead = 4;
    hide(DATA + 8n, '11223344', 'aabbccdd');
    load('8b06', { rsi: DATA + 8n, rax: 0n }); // mov eax, [rsi]
    session.listen(1);
    expect(machine.registers(0).rip).toBe(CODE);
    library.advance = () => [];
    session.pause();
    expect(machine.registers(0)).toMatchObject({ rip: CODE + 2n, rax: 0x4433_2211n });
    session.resume();
  });

  describe.each([true, false])(
    'and another instruction that has to be shown bytes (trap flag: %s)',
    (trapFlag) => {
      /** At a place that is hidden itself, vCPU 1 reads once what vCPU 0 reads twice. */
      function bothTrap(): { first: Trap[]; second: Trap[] } {
        session.close();
        attach(new XenLibrary(machine, { trapFlag }));
        hide(DATA, 'f4f4f4', '8b07f4'); // mov eax, [rdi]; hlt in place of three halts
        hide(DATA + 0x808n, '11223344', 'aabbccdd');
        load('a7', { rsi: DATA + 0x808n, rdi: DATA + 0x808n, rflags: 2n }); // cmpsd
        machine.setRegisters(1, { rip: DATA, rdi: DATA + 0x808n, rax: 0n });
        session.onViolation(() => hexBytes('11223344'), {
          onlyRead: ({ vcpu }) => (vcpu === 1 ? 4 : undefined),
          piecesOn: (gfn) => pieces.filter((piece) => gfnOf(piece.gpa) === gfn),
          written: () => {},
        });
        return { first: step(0), second: step(1) };
      }

      function bothGetThere(): void {
        library.advance = () => [...step(0), ...step(1)];
        const isThere = () =>
          machine.registers(0).rip > CODE && machine.registers(1).rip > DATA && !library.stepping;
        for (let listens = 0; !isThere(); listens++) {
          if (listens > 1000) throw new Error('the code did not get there');
          session.listen(1);
        }
        session.listen(1);
        expect(machine.registers(1).rax).toBe(0x4433_2211n);
        expect(machine.registers(0).rflags & ZERO_FLAG).toBe(ZERO_FLAG);
        expectHidden();
      }

      test('is not decoded from what is shown', () => {
        const { first, second } = bothTrap();
        library.deliver([...second, ...first]);
        session.listen(0);
        expect(library.answers).toMatchObject({ again: 1, withData: 1, emulated: 0 });
        expect([...machine.readPhysical(DATA, 3)]).toEqual([...hexBytes('8b07f4')]);
        bothGetThere();
      });

      test('is not begun while it would be', () => {
        const { first, second } = bothTrap();
        library.deliver([...first, ...second]);
        session.listen(0);
        expect(library.answers).toMatchObject({ withData: 0 });
        bothGetThere();
      });
    },
  );
});

describe('where the processor has no monitor trap flag', () => {
  beforeEach(() => {
    session.close();
    attach(new XenLibrary(machine, { trapFlag: false }));
  });

  test('a comparison of hidden places on two frames sees the original bytes of both', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    hide(NEXT_PAGE + 64n, '11223344', '01020304');
    load('a7', { rsi: DATA + 8n, rdi: NEXT_PAGE + 64n, rflags: 2n }); // cmpsd
    expect(runTo(CODE + 1n).rflags & ZERO_FLAG).toBe(ZERO_FLAG);
    expect(library.answers).toMatchObject({ emulated: 1, steps: 0 });
    expectHidden();
  });

  test('a copy of many elements sees them in each', () => {
    hide(DATA + 8n, '1122334455', 'aabbccddee');
    load('f3a4', { rsi: DATA + 8n, rdi: SCRATCH, rcx: 5n }); // rep movsb
    runTo(CODE + 2n);
    expect([...machine.readPhysical(SCRATCH, 5)]).toEqual([...hexBytes('1122334455')]);
    expectHidden();
  });

  test('the next event of the vCPU ends it, also at the same instruction with the same registers', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    load('a7', { rsi: DATA + 8n, rdi: DATA + 8n, rflags: 2n }); // cmpsd
    library.advance = () => {
      machine.setRegisters(0, { rip: CODE, rsi: DATA + 8n, rdi: DATA + 8n });
      return step(0);
    };
    // Whoever looks at the vCPU finds it where it was.
    session.registers(0);
    const look = vi.spyOn(library.functions, 'vmi_get_vcpuregs').mockReturnValue(0);
    for (let round = 1; round <= 3; round++) {
      session.listen(1);
      session.listen(0);
      expect(library.answers.emulated).toBe(round);
      expect([...machine.readPhysical(DATA + 8n, 4)]).toEqual([...hexBytes('11223344')]);
      expect(machine.access(gfnOf(DATA))).toBe(0);
    }
    look.mockRestore();
    library.advance = () => [];
    session.pause();
    expectHidden();
    session.resume();
  });

  test('another vCPU neither executes nor reads what is shown', () => {
    hide(DATA, 'f4f4f4', 'ffc3f4'); // inc ebx; hlt in place of two halts
    hide(DATA + 0x808n, '11223344', 'aabbccdd');
    load('a7', { rsi: DATA + 0x808n, rdi: DATA + 0x808n, rflags: 2n });
    machine.setRegisters(1, { rip: DATA, rbx: 5n });
    session.listen(1);
    library.advance = () => [];
    library.deliver(step(1));
    expect(machine.registers(1)).toMatchObject({ rip: DATA, rbx: 5n });
    session.listen(1);
    expect(library.answers).toMatchObject({ again: 1, emulated: 1 });
    library.advance = () => step(1);
    session.listen(1);
    expect(machine.registers(1).rbx).toBe(6n);
    expectHidden();
  });
});

describe('showing them fails', () => {
  test('at the second frame of an instruction: everything is hidden, and the vCPU is stepped no more', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    hide(NEXT_PAGE + 64n, '11223344', '01020304');
    load(`a7${'90'.repeat(20)}`, { rsi: DATA + 8n, rdi: NEXT_PAGE + 64n, rflags: 2n });
    const functions = library.functions as Record<string, (...args: unknown[]) => number>;
    const set = functions.vmi_set_mem_event!;
    let shown = 0;
    functions.vmi_set_mem_event = (...args) => (args[2] === ABI_EXECUTE && ++shown === 2 ? 1 : set(...args));
    // Behind the HLT: nothing stops it before.
    const end = CODE + 22n;
    expect(() => runTo(end)).toThrow(expect.objectContaining({ code: 'HYPERVISOR_FAILED' }));
    runTo(end);
    expectHidden();
  });
});

describe('looking at a vCPU fails', () => {
  test('while a pause waits for what it emulates: the guest is not left paused', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    onlyRead = 4;
    load('8b06', { rsi: DATA + 8n }); // mov eax, [rsi]
    session.listen(1);
    expect(library.answers.withData).toBe(1);
    vi.spyOn(library.functions, 'vmi_get_vcpuregs').mockReturnValue(1);
    expect(() => session.pause()).toThrow(expect.objectContaining({ code: 'HYPERVISOR_GONE' }));
    expect(library.functions.vmi_resume_vm(0n)).toBe(1);
  });
});

describe('closing with a violation that was raised before', () => {
  test('shows nothing any more: it is decided by the permissions that the frame has then', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    load('a7', { rsi: DATA + 8n, rdi: DATA + 8n, rflags: 2n });
    library.deliver(step(0));
    library.advance = () => [];
    session.close();
    expect([...machine.readPhysical(DATA + 8n, 4)]).toEqual([...hexBytes('aabbccdd')]);
    expect(machine.access(gfnOf(DATA))).toBe(ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE);
    expect(library.stepping).toBe(false);
  });
});

describe('attaching', () => {
  test('a guest with more vCPUs than libvmi can step is refused', () => {
    const crowded = new XenLibrary(machine);
    vi.spyOn(crowded.functions, 'vmi_get_num_vcpus').mockReturnValue(33);
    vi.spyOn(crowded.functions, 'vmi_get_vcpuregs').mockReturnValue(0);
    expect(() => openSessionOn(crowded, { name: 'guest' })).toThrow(
      expect.objectContaining({ code: 'GUEST_UNSUPPORTED' }),
    );
  });
});

describe('a violation from before a pause', () => {
  test('is not decided on: the instruction faults again, and sees what is there then', () => {
    onlyRead = 4;
    hide(DATA + 8n, '11223344', 'aabbccdd');
    load('8b06', { rsi: DATA + 8n, rax: 0n });
    const trap = step(0);
    library.advance = () => [];
    session.pause();
    library.deliver(trap);
    expect(session.listen(0)).toBe(1);
    expect(session.listen(0)).toBe(0);
    expect(asked).toEqual([]);
    pieces[0] = { ...pieces[0]!, original: hexBytes('55667788') };
    session.resume();
    library.advance = () => step(0);
    expect(runTo(CODE + 2n).rax).toBe(0x8877_6655n);
  });
});

describe('a handler that fails', () => {
  test('leaves no vCPU faulting for ever', () => {
    hide(DATA + 8n, '11223344', 'aabbccdd');
    session.onViolation(() => {
      throw new Error('in the handler');
    });
    load('8b06', { rsi: DATA + 8n, rax: 0n });
    expect(() => runTo(CODE + 2n)).toThrow('in the handler');
    expect(runTo(CODE + 2n).rax).toBe(0xddcc_bbaan);
  });
});

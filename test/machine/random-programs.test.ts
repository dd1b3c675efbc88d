// Straight-line programs over all registers: with every access to their data trapped and completed they compute
// what they compute without.
import fc from 'fast-check';
import { afterAll, expect, it } from 'vitest';
import { ACCESS_EXECUTE, ACCESS_WRITE } from '../../src/machine/machine.js';
import { GPR_NAMES, type GprName, type Registers } from '../../src/x86/registers.js';
import { CODE, createFlatMachine, DATA, setAccess } from './support.js';

const DATA_FRAMES = 2;
const DATA_BYTES = DATA_FRAMES * 0x1000;
const RSP = 4;
const ALL = 7;

const machine = createFlatMachine({ vcpus: 2 });
afterAll(() => machine.close());

/** The opcode bytes of forms with a ModRM byte, each of a register and memory. */
const OPCODES: readonly (readonly number[])[] = [
  [0x8b], // mov r, m
  [0x89], // mov m, r
  [0x8a], // mov r8, m8
  [0x88], // mov m8, r8
  [0x03], // add r, m
  [0x01], // add m, r
  [0x13], // adc r, m
  [0x19], // sbb m, r
  [0x23], // and r, m
  [0x09], // or m, r
  [0x33], // xor r, m
  [0x3b], // cmp r, m
  [0x85], // test m, r
  [0x87], // xchg m, r
  [0x0f, 0xb6], // movzx
  [0x0f, 0xbf], // movsx
  [0x0f, 0xaf], // imul
  [0x0f, 0x44], // cmovz
  [0x0f, 0x42], // cmovb
  [0x0f, 0xb1], // cmpxchg
  [0x0f, 0xc1], // xadd
  [0x0f, 0xa3], // bt m, r
  [0x0f, 0xbb], // btc m, r
  [0x0f, 0x10], // movups xmm, m
  [0x0f, 0x11], // movups m, xmm
  [0x0f, 0x57], // xorps
];
const BIT_STRINGS = [0xa3, 0xbb];
const IMUL = 0xaf;
const XORPS = 0x57;

interface Step {
  readonly opcode: readonly number[];
  readonly wide: boolean;
  readonly short: boolean;
  readonly register: number;
  readonly base: number;
  readonly offset: number;
}

const step: fc.Arbitrary<Step> = fc.record({
  opcode: fc.constantFrom(...OPCODES),
  wide: fc.boolean(),
  short: fc.boolean(),
  register: fc.integer({ min: 0, max: 15 }),
  base: fc.integer({ min: 0, max: 15 }),
  // Most cross a boundary between the frames, or lie near it.
  offset: fc.oneof(fc.integer({ min: 0xff0, max: 0x1008 }), fc.integer({ min: 64, max: DATA_BYTES - 64 })),
});

/** mov base, address; OP register, [base+disp8] */
function encode(step: Step): Buffer {
  const { opcode, wide, short, register, offset } = step;
  const twoByte = opcode[1] ?? 0;
  const sse = [0x10, 0x11, XORPS].includes(twoByte);
  const bitString = BIT_STRINGS.includes(twoByte);
  const base = bitString && step.base === register ? (register + 1) & 0xf : step.base;
  const target = DATA + BigInt(twoByte === XORPS ? offset & ~0xf : offset);
  const displacement = offset % 100;
  const load = Buffer.alloc(10);
  load[0] = 0x48 | (base >> 3);
  load[1] = 0xb8 | (base & 7);
  load.writeBigUInt64LE(target - BigInt(displacement), 2);
  // A bit string's index is made small, so that it stays in the data.
  const index = [0x48 | (register >> 3), 0xc7, 0xc0 | (register & 7), offset & 0x7f, 0, 0, 0];
  const prefix = short && !sse ? [0x66] : [];
  const rex = 0x40 | (wide && !sse ? 8 : 0) | ((register >> 3) << 2) | (base >> 3);
  const modrm = 0x40 | ((register & 7) << 3) | (base & 7);
  // RSP and R12 as a base need a SIB byte.
  const sib = (base & 7) === RSP ? [0x24] : [];
  // Some flags are undefined after these: adc register, 0 takes in the carry and defines all.
  const define = [0x48 | (register >> 3), 0x83, 0xd0 | (register & 7), 0];
  return Buffer.concat([
    load,
    Buffer.from(bitString ? index : []),
    Buffer.from([...prefix, rex, ...opcode, modrm, ...sib, displacement]),
    Buffer.from(bitString || twoByte === IMUL ? define : []),
  ]);
}

const word = fc.bigInt({ min: 0n, max: (1n << 64n) - 1n });
const registers = fc.array(word, { minLength: 16, maxLength: 16 });

/** All sixteen SSE registers to memory that the permission does not concern: movups [rip+disp], xmmN. */
function saveSse(at: bigint, to: bigint): Buffer {
  const LENGTH = 8;
  return Buffer.concat(
    Array.from({ length: 16 }, (_, index) => {
      const code = Buffer.from([0x44, 0x0f, 0x11, 0x05 | ((index & 7) << 3), 0, 0, 0, 0]);
      if (index < 8) code[0] = 0x40;
      code.writeInt32LE(Number(to + BigInt(index * 16) - (at + BigInt((index + 1) * LENGTH))), 4);
      return code;
    }),
  );
}

type Mode = 'free running' | 'stepped';

function execute(code: Buffer, values: readonly bigint[], access: number, mode: Mode) {
  const SAVED = CODE + 0x8000n;
  const data = Buffer.from(Array.from({ length: DATA_BYTES }, (_, i) => (i * 167 + (i >> 7)) & 0xff));
  machine.writePhysical(DATA, data);
  machine.writePhysical(SAVED, Buffer.alloc(0x100));
  // The SSE registers begin as zeros: xorps xmmN, xmmN
  const clear = Buffer.concat(
    Array.from({ length: 16 }, (_, n) =>
      Buffer.from([n < 8 ? 0x40 : 0x45, 0x0f, XORPS, 0xc0 | ((n & 7) * 9)]),
    ),
  );
  const save = saveSse(CODE + BigInt(clear.length + code.length), SAVED);
  machine.writePhysical(CODE, Buffer.concat([clear, code, save, Buffer.of(0xf4)]));
  setAccess(machine, DATA, DATA_FRAMES, access);
  const initial = Object.fromEntries(GPR_NAMES.map((name, i) => [name, values[i]])) as Record<
    GprName,
    bigint
  >;
  machine.setRegisters(0, { ...initial, rip: CODE, rflags: 2n });
  let traps = 0;
  for (;;) {
    const trap = mode === 'stepped' ? machine.step(0, 10_000).trap : machine.run(100_000).traps[0];
    if (trap === undefined) break;
    traps++;
    // Where it reads, the real bytes as substituted data: the way through a shadow must come to the same.
    const real = machine.readPhysical(trap.gpa, trap.length);
    machine.complete(0, trap.access === 'read' && traps % 2 === 0 ? real : undefined);
  }
  const after: Registers = machine.registers(0);
  return {
    traps,
    after,
    memory: machine.readPhysical(DATA, DATA_BYTES).toString('hex'),
    sse: machine.readPhysical(SAVED, 0x100).toString('hex'),
    end: CODE + BigInt(clear.length + code.length + save.length + 1),
  };
}

it.each(['free running', 'stepped'] as const)('random programs (%s)', (mode) => {
  fc.assert(
    fc.property(fc.array(step, { minLength: 1, maxLength: 20 }), registers, (steps, values) => {
      const code = Buffer.concat(steps.map(encode));
      const plain = execute(code, values, ALL, mode);
      expect(plain.traps).toBe(0);
      expect(plain.after.rip).toBe(plain.end);
      for (const access of [ACCESS_EXECUTE, ACCESS_WRITE]) {
        const { traps, ...trapped } = execute(code, values, access, mode);
        const { traps: _, ...expected } = plain;
        expect(trapped).toEqual(expected);
        if (access === ACCESS_EXECUTE) expect(traps).toBeGreaterThan(0);
      }
    }),
    { numRuns: 150 },
  );
});
